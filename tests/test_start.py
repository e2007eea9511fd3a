"""What `mamba2-train` imports before it does anything: modules, not seconds."""

import json
import subprocess
import sys

# each for one command, one logger or one format; they are imported where they are used
LATER = ("datasets", "lm_eval", "mistral_common", "pandas", "sklearn", "tensorboard", "trl")
LATER += ("transformers.trainer", "wandb")
MOST = 5200  # modules; 5,060 with torch 2.13, Lightning 2.6, transformers 5.23 and peft 0.21


def test_imports():
    code = "import json, sys, mamba2_train.commands.train; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    modules = json.loads(done.stdout)
    assert "lightning" in modules
    assert not [name for name in LATER if name in modules]
    assert len(modules) <= MOST
