"""The options of `fused-resnet train`: defaults, what each refuses, and what contradicts what."""

import pytest
from train_arguments import arguments

from fused_resnet.options import UsageError
from fused_resnet.training.contradictions import check

DEFAULTS = {
    "model": "resnet50",
    "data": None,
    "dataset": "imagefolder",
    "classes": None,
    "size": None,
    "val_size": None,
    "val_resize": None,
    "epochs": 90,
    "batch_size": 256,
    "grad_accum": 1,
    "num_classes": None,
    "workers": None,
    "max_unreadable": 0.01,
    "pretrained": None,
    "freeze": [],
    "opt": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "norm_weight_decay": None,
    "clip_grad": None,
    "scheduler": "cosine",
    "lr_step_size": 30,
    "lr_milestones": [],
    "lr_gamma": 0.1,
    "min_lr": 0.0,
    "warmup_epochs": 0,
    "warmup_factor": 0.01,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "random_erase": 0.0,
    "auto_augment": None,
    "amp": False,
    "amp_dtype": "bf16",
    "channels_last": True,
    "model_ema": False,
    "model_ema_decay": 0.9998,
    "grad_checkpointing": False,
    "lean": False,
    "sync_bn": False,
    "fsdp": False,
    "compile": False,
    "backend": None,
    "device": None,
    "threads": None,
    "seed": 0,
    "deterministic": False,
    "val_tencrop": False,
    "output": None,
    "resume": None,
    "keep": 3,
    "save_steps": None,
    "save_minutes": 10.0,
    "timeout": 60,
    "json": False,
    "config": None,
}


def test_defaults():
    found = vars(arguments())
    assert found == DEFAULTS
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in DEFAULTS.items()}


@pytest.mark.parametrize("name", sorted(name for name, value in DEFAULTS.items() if isinstance(value, bool)))
def test_switches_go_both_ways(name):
    option = name.replace("_", "-")
    assert getattr(arguments(f"--no-{option}", f"--{option}"), name) is True
    assert getattr(arguments(f"--{option}", f"--no-{option}"), name) is False


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--pretrained"], "pretrained", "DEFAULT"),
        (["--pretrained", "weights.pth"], "pretrained", "weights.pth"),
        (["--warmup-factor", "1/3"], "warmup_factor", 1 / 3),
        (["--warmup-factor", "0.333"], "warmup_factor", 0.333),
        (["--auto-augment", "ra"], "auto_augment", "ra"),
        (["--auto-augment", "ra", "--auto-augment", "none"], "auto_augment", None),
        (["--clip-grad", "1", "--clip-grad", "none"], "clip_grad", None),
        (["--norm-weight-decay", "0"], "norm_weight_decay", 0.0),
        (["--save-steps", "none"], "save_steps", None),
        (["--lr-milestones", "82", "123"], "lr_milestones", [82, 123]),
        (["--lr-milestones", "82", "--lr-milestones"], "lr_milestones", []),
        (["--classes", "airplane", "bird"], "classes", ["airplane", "bird"]),
        (["--workers", "0"], "workers", 0),
        (["--max-unreadable", "1"], "max_unreadable", 1.0),
    ],
)
def test_values(argv, name, value):
    found = getattr(arguments(*argv), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "argument --epochs: expected a positive whole number, got '0'"),
        (["--batch-size", "2.5"], "argument --batch-size: expected a positive whole number, got '2.5'"),
        (["--lr-milestones", "82", "x"], "argument --lr-milestones: expected a positive whole number, got 'x'"),
        (["--save-steps", "0"], "argument --save-steps: expected a positive whole number, got '0'"),
        (["--workers=-1"], "argument --workers: expected a whole number of 0 or more, got '-1'"),
        (["--seed", "²"], "argument --seed: expected a whole number of 0 or more, got '²'"),
        (["--seed", 2**63], "argument --seed: expected a whole number below 2**63"),
        (["--lr", "nan"], "argument --lr: expected a number of 0 or more, got 'nan'"),
        (["--lr", "inf"], "argument --lr: expected a number of 0 or more, got 'inf'"),
        (["--lr", "fast"], "argument --lr: expected a number of 0 or more, got 'fast'"),
        (["--weight-decay=-1e-4"], "argument --weight-decay: expected a number of 0 or more, got '-1e-4'"),
        (["--clip-grad", "0"], "argument --clip-grad: expected a number above 0, got '0'"),
        (["--save-minutes", "0"], "argument --save-minutes: expected a number above 0, got '0'"),
        (["--random-erase", "1.5"], "argument --random-erase: expected a number from 0 to 1, got '1.5'"),
        (["--max-unreadable", "5%"], "argument --max-unreadable: expected a number from 0 to 1, got '5%'"),
        (["--label-smoothing", "1"], "argument --label-smoothing: expected a number from 0 and below 1, got '1'"),
        (["--warmup-factor", "0"], "argument --warmup-factor: expected a number above 0 and up to 1, got '0'"),
        (["--warmup-factor", "1/0"], "argument --warmup-factor: expected a number above 0 and up to 1, got '1/0'"),
        (["--auto-augment", "rand"], "expected ra, ta_wide, augmix, imagenet, cifar10 or none, got 'rand'"),
        (["--opt", "lion"], "argument --opt: invalid choice: 'lion'"),
        (["--dataset", "mnist"], "argument --dataset: invalid choice: 'mnist'"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    ],
)
def test_bad_values(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments(*argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        "--dataset digits",
        "--dataset synthetic --random-erase 0.5 --auto-augment ra",
        "--dataset digits --random-erase 0.5 --auto-augment ra",
        "--dataset synthetic --fsdp --model-ema --compile",
        "--dataset synthetic --device cpu --amp --amp-dtype fp16",
        "--dataset synthetic --warmup-epochs 2 --epochs 3",
        "--dataset synthetic --scheduler multistep --lr-milestones 3 5 --epochs 2",
        "--dataset synthetic --min-lr 1e-5",
        "--dataset synthetic --mixup 0.2 --cutmix 1",
        "--dataset synthetic --opt sgd --momentum 0",
        "--dataset cifar10 --data cifar --classes airplane bird",
        "--data photos --val-tencrop",
        "--data photos --size 176 --val-size 224 --val-resize 232",
        "--data photos --size 224 --val-size 224 --val-resize 224",
        "--data photos --pretrained --freeze trunk",
    ],
)
def test_allowed_together(argv):
    check(arguments(*argv.split()))


def test_no_class_named_means_all():
    args = arguments("--dataset", "digits", "--classes")
    check(args)
    assert args.classes is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "--dataset imagefolder needs --data, the folder of its images"),
        ("--dataset cifar10", "--dataset cifar10 needs --data, the folder of its images"),
        ("--dataset digits --data x", "--data x contradicts --dataset digits, which reads no files"),
        ("--dataset synthetic --data x", "--data x contradicts --dataset synthetic, which reads no files"),
        ("--data x --model resnet51", "--model resnet51: unknown; did you mean resnet50 or "),
        ("--data x --model qqqq", "--model qqqq: unknown; expected one of cifar_resnet110, "),
        ("--data x --freeze trunk fc", "--freeze trunk stands alone: it is all but the head"),
        ("--dataset digits --val-tencrop", "--val-tencrop is for --dataset imagefolder, not for --dataset digits"),
        (
            "--dataset synthetic --val-tencrop",
            "--val-tencrop is for --dataset imagefolder, not for --dataset synthetic",
        ),
        (
            "--dataset cifar10 --data x --val-tencrop",
            "--val-tencrop is for --dataset imagefolder, not for --dataset cifar10",
        ),
        ("--data x --classes cat dog cat", "--classes names cat twice"),
        ("--data x --classes cat", "--classes needs two names or more"),
        ("--data x --val-resize 223", "--val-resize 223 is less than --size 224, which is cut out of it"),
        ("--data x --size 200 --val-resize 199", "--val-resize 199 is less than --size 200, which is cut out of it"),
        (
            "--data x --size 100 --val-size 200 --val-resize 199",
            "--val-resize 199 is less than --val-size 200, which is cut out of it",
        ),
        (
            "--data x --lr-milestones 3",
            "--lr-milestones is for --scheduler multistep, not for --scheduler cosine",
        ),
        ("--data x --scheduler multistep", "--scheduler multistep needs --lr-milestones"),
        ("--data x --scheduler multistep --lr-milestones 5 3", "--lr-milestones must rise, got 5 3"),
        ("--data x --scheduler multistep --lr-milestones 3 3", "--lr-milestones must rise, got 3 3"),
        ("--data x --scheduler step --min-lr 0.01", "--min-lr is for --scheduler cosine, not for --scheduler step"),
        ("--data x --min-lr 0.2", "--min-lr 0.2 is more than --lr 0.1"),
        ("--data x --warmup-epochs 5 --epochs 5", "--warmup-epochs 5 must be less than --epochs 5"),
        ("--data x --opt nesterov --momentum 0", "--opt nesterov needs a --momentum above 0"),
    ],
)
def test_contradictions(argv, message):
    with pytest.raises(UsageError) as refused:
        check(arguments(*argv.split()))
    assert str(refused.value).startswith(message)
