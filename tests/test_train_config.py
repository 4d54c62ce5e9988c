"""`--config`: the recipes that are shipped, what a file may say, and the message of every bad one."""

from pathlib import Path

import pytest
from train_arguments import arguments

from fused_resnet.options import UsageError
from fused_resnet.training.config import RECIPES, recipes, with_config
from fused_resnet.training.contradictions import check

NAMES = [
    "cifar_resnet110",
    "cifar_resnet20",
    "imagenet_resnet50_300",
    "imagenet_resnet50_90",
    "preact_cifar10",
    "two_class_resnet34",
]


@pytest.fixture
def file(tmp_path):
    """Write a config; its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "mine.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def parsed(*argv):
    return arguments(*with_config(["train", *argv])[1:])


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_recipes_are_all_there():
    assert recipes() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipe_parses_and_checks(name):
    args = parsed("--config", name, "--data", "somewhere")
    check(args)
    assert args.config == name
    assert args.data == "somewhere"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_begins_with_what_it_is(name):
    comment = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").partition("\nmodel = ")[0]
    assert all(line.startswith("# ") for line in comment.splitlines())
    assert "report" in comment or "reach" in comment


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet110", "preact_cifar10"])
def test_cifar_recipes_divide_where_the_paper_does(name):
    args = parsed("--config", name)
    steps = -(-50_000 // args.batch_size)
    assert steps == 391
    assert [round(iteration / steps) for iteration in (32_000, 48_000, 64_000)] == [*args.lr_milestones, args.epochs]


def test_recipe_with_another_model():
    assert parsed("--config", "cifar_resnet20", "--model", "cifar_resnet56").model == "cifar_resnet56"


# --- what a file may say ----------------------------------------------------------------------------------------------


def test_kinds_of_values(file):
    path = file(
        'model = "resnet18"\nlr-gamma = 0.5\nbatch_size = 8\nlr = 1\nclip_grad = "none"\nwarmup_factor = "1/3"\n'
        "amp = true\nchannels_last = false\npretrained = true\n"
        'classes = ["a b", "c"]\nlr_milestones = [1, 2]\nfreeze = "trunk"\n'
    )
    args = parsed("--config", path)
    assert (args.model, args.lr_gamma, args.batch_size, args.lr) == ("resnet18", 0.5, 8, 1.0)
    assert (args.amp, args.channels_last) == (True, False)
    assert (args.classes, args.lr_milestones, args.freeze) == (["a b", "c"], [1, 2], ["trunk"])
    assert (args.clip_grad, args.warmup_factor, args.pretrained) == (None, 1 / 3, "DEFAULT")


def test_false_where_a_value_may_be_left_out(file):
    assert parsed("--config", file("pretrained = false")).pretrained is None


def test_text_that_begins_with_a_dash(file):
    assert parsed("--config", file('output = "-x"')).output == "-x"


@pytest.mark.parametrize("where", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_command_line_overrides(file, form, where):
    path = file("epochs = 7\namp = true\nlr_milestones = [3, 4]\nbatch_size = 5")
    argv = ["--epochs=9", "--no-amp", "--lr-milestones", "6"]
    argv[where:where] = form.format(path).split()
    args = parsed(*argv)
    assert (args.epochs, args.amp, args.lr_milestones, args.batch_size) == (9, False, [6], 5)


def test_list_can_be_taken_back():
    args = parsed("--config", "cifar_resnet20", "--data", "x", "--scheduler", "cosine", "--lr-milestones")
    check(args)
    assert args.lr_milestones == []


def test_stray_word_is_not_taken_into_a_list(file, capsys):
    with pytest.raises(SystemExit):
        parsed("stray", "--config", file('classes = ["a", "b"]'))
    assert "unrecognized arguments: stray" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[], ["info", "--config", "x"], ["train"], ["train", "--epochs", "3"], ["train", "--config"]]
)
def test_without_a_config_nothing_changes(argv):
    assert with_config(argv) == argv


@pytest.mark.parametrize("argv", [["--config"], ["--config", "--amp"]])
def test_config_without_a_value_is_for_argparse(argv, capsys):
    with pytest.raises(SystemExit):
        parsed(*argv)
    assert "argument --config: expected one argument" in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "epoch: no such option; the nearest is epochs"),
        ("weight_deacy = 3", "weight_deacy: no such option; the nearest is weight_decay"),
        ("no_amp = true", "no_amp: no such option; the nearest is "),
        ("help = true", "help: no such option; the nearest is "),
        ('config = "other.toml"', "config: a config cannot name another"),
        ("lr_gamma = 0.1\nlr-gamma = 0.2", "lr-gamma: given twice, with - and with _"),
        ("[model]\nname = 3", "model: a table; options stand in no table"),
        ("[[model]]\nname = 3", "model: expected one value, got a list"),
        ("[[classes]]\nname = 3", "classes: expected text, got {'name': 3}"),
        ('amp = "yes"', "amp: expected true or false, got 'yes'"),
        ("amp = 1", "amp: expected true or false, got 1"),
        ("epochs = [3]", "epochs: expected one value, got a list"),
        ("epochs = true", "epochs: expected a number or text, got True"),
        ("epochs = 3.5", "epochs: expected a positive whole number, got '3.5'"),
        ("epochs = -3", "epochs: expected a positive whole number, got '-3'"),
        ("lr = nan", "lr: expected a number of 0 or more, got 'nan'"),
        ("lr = 2020-01-01", "lr: expected a number or text, got datetime.date(2020, 1, 1)"),
        ('lr = "fast"', "lr: expected a number of 0 or more, got 'fast'"),
        ("lr_milestones = [3, -1]", "lr_milestones: expected a positive whole number, got '-1'"),
        ("lr_milestones = [[3]]", "lr_milestones: expected a number or text, got [3]"),
        ("model = 50", "model: expected text, got 50"),
        ("classes = [0, 1]", "classes: expected text, got 0"),
        ('classes = ["a", "--amp"]', "classes: '--amp' begins with a -, and would be taken for an option"),
        ('opt = "lion"', "opt: expected one of sgd, nesterov, adam, adamw, rmsprop, got 'lion'"),
        ('auto_augment = "rand"', "auto_augment: expected ra, ta_wide, augmix, imagenet, cifar10 or none, got 'rand'"),
        ("lr = 0.1\nepochs = = 3", "not TOML: "),
        (b'output = "\xff"', "not a text file in UTF-8"),
    ],
)
def test_bad_files(file, text, message):
    path = file(text)
    with pytest.raises(UsageError) as refused:
        with_config(["train", "--config", path])
    assert str(refused.value).startswith(f"--config {path}: {message}")


def test_syntax_error_names_the_line(file):
    with pytest.raises(UsageError, match=r"not TOML: .*line 2"):
        with_config(["train", "--config", file("lr = 0.1\nepochs = = 3")])


@pytest.mark.parametrize("name", ["cifar_resnet21", "no/such/file.toml"])
def test_missing_file_lists_the_recipes(name):
    with pytest.raises(UsageError) as refused:
        with_config(["train", "--config", name])
    expected = f"--config {name}: no such file, and no such recipe; the recipes are {', '.join(NAMES)}"
    assert str(refused.value) == expected


def test_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="directory"):
        with_config(["train", "--config", str(tmp_path)])


def test_two_configs_are_refused():
    with pytest.raises(UsageError, match="--config is given 2 times"):
        with_config(["train", "--config", "cifar_resnet20", "--config=cifar_resnet110"])


def test_recipes_are_in_the_wheel():
    """setuptools takes along what pyproject.toml names."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '"training/recipes/*.toml"' in text
