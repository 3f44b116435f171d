"""The commands in README.md and docs/: every flag is one, every config can be run."""

import re
import shlex
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import main
from rise_jax import known_sizes
from rise_jax.validate import validate

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK, INLINE, SETTING = r"```bash\n(.*?)```", r"`(python main\.py [^`]+)`", r'^\s*([A-Z]+)="([^"]*)"'


def commands():
    """'FILE: words behind main.py' of every command of main.py, with the shell's variables of its file."""
    for file in FILES:
        text = file.read_text()
        settings = dict(re.findall(SETTING, text, re.MULTILINE))
        lines = [line for block in re.findall(BLOCK, text, re.DOTALL) for line in block.splitlines()]
        for line in lines + re.findall(INLINE, text):
            line = re.sub(r"\$([A-Z]+)", lambda name, settings=settings: settings[name[1]], line)
            for command in re.findall(r"python main\.py ((?:[^&#\"']|\"[^\"]*\"|'[^']*')*)", line):
                yield f"{file.name}: {' '.join(command.split())}"


COMMANDS = sorted(set(commands()))


def test_the_commands_are_found():
    assert len(COMMANDS) > 20
    assert {"README.md", "data.md", "published.md", "plan.md"} <= {command.split(":")[0] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documentation_can_be_run(command, monkeypatch):
    words = ["main.py", *shlex.split(command.partition(": ")[2])]
    monkeypatch.setattr("sys.argv", words)  # where ml_collections looks for the keys
    monkeypatch.chdir(ROOT)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    flags.DEFINE_enum("mode", "train", main.MODES, "", flag_values=values)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    assert values(words) == ["main.py"]
    config = ConfigDict(values.config.to_dict())
    config.model.dit.path = ""  # of files that are not here, sizes cannot be compared
    validate(config, known_sizes.vae_sizes(config.model.vae.path)[0])
