"""``iou-balanced-d2 COMMAND``, ``python -m iou_balanced_d2`` and the scripts of a clone."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

from iou_balanced_d2.arguments import COMMANDS, launch_argument_parser, parse
from iou_balanced_d2.commands import main
from iou_balanced_d2.errors import UserError

ROOT = Path(__file__).parents[1]
# Ends with 3 if torch was loaded.
RUN = "import sys, runpy; sys.argv = sys.argv[1:]; sys.orig_argv = ['python', *{orig!r}]\n"
RUN += "try: {run}\nfinally: 'torch' in sys.modules and sys.exit(3)"


def run_without_torch(run, *words, orig=()):
    command = [sys.executable, "-c", RUN.format(run=run, orig=list(orig)), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("run", "words", "orig"),
    [
        ("runpy.run_path('train_net.py', run_name='__main__')", ["train_net.py"], []),
        ("runpy.run_path('tools/compare_runs.py', run_name='__main__')",
         ["tools/compare_runs.py"], []),
        ("from iou_balanced_d2.commands import main; sys.exit(main())",
         ["/usr/bin/iou-balanced-d2", "train"], []),
        ("runpy.run_module('iou_balanced_d2', run_name='__main__')", ["-m", "new-config"],
         ["-m", "iou_balanced_d2"]),
    ],
    ids=["train_net.py", "tools", "console", "-m"],
)  # fmt: skip
def test_help_and_wrong_flags_do_not_wait_for_torch(run, words, orig):
    done = run_without_torch(run, *words, "--help", orig=orig)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    done = run_without_torch(run, *words, "--no-such-flag", orig=orig)
    assert done.returncode == 2
    assert "error: " in done.stderr.splitlines()[-1]


def test_a_command_that_only_takes_the_config_function_has_all_registered():
    code = "from iou_balanced_d2 import add_iou_balanced_config\n"
    code += "from detectron2.modeling import META_ARCH_REGISTRY as r\n"
    code += "print('IoUBalancedRetinaNet' in r)"
    run = f"exec({code!r})"
    done = run_without_torch(run, "/usr/bin/iou-balanced-d2")
    assert done.stdout == "True\n", done.stderr


def test_the_list_of_commands(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in listed
        assert find_spec(f"iou_balanced_d2.commands.{command.module}")
        folder = {"train": "", "demo": "demo"}.get(name, "tools")
        assert (ROOT / folder / f"{command.module}.py").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trane"], "iou-balanced-d2: error: no command 'trane'; did you mean 'train'?"),
        (["?"], "iou-balanced-d2: error: no command '?'; there are new-config, check, "),
        (["check", "--config-file", "no.yaml"],
         "iou-balanced-d2 check: error: config file 'no.yaml' not found"),
        (["train"], "iou-balanced-d2 train: error: --config-file is required"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_the_flags_are_detectron2s():
    ours = {a.dest: a for a in launch_argument_parser()._actions}
    for action in default_argument_parser()._actions:
        mine = ours[action.dest]
        assert mine.option_strings == action.option_strings
        assert (mine.type, mine.nargs) == (action.type, action.nargs)
        assert mine.default == action.default or action.dest in ("dist_url", "opts")


@pytest.mark.parametrize("name", ["train", "check", "export", "visualize"])
def test_flags_stand_before_pairs(name):
    given = ["--config-file", "x.yaml", *(["--output", "o"] if name == "export" else [])]
    with pytest.raises(UserError, match="--quick must stand before the KEY VALUE options"):
        parse(name, [*given, "SEED", "1", "--quick"])
