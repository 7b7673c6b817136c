"""The command line: each Config field is a flag, each command accepts those it uses, a preset is a list of flags."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import unicodedata
from dataclasses import fields

from ex2.errors import InputError
from ex2.settings.config import GROUPS, GUIDANCE_SCALES, WEIGHTS, Config, expand_path, kind_of

MAX_EVALUATED = 1_000_000  # samples; of each one a row of features is held in memory
VARIABLE_GROUPS = ("diffusion process", "model", "training")  # of settings that a study varies
RUN_FLAGS_OF_TRAIN = (
    "run_name results_dir save_model save_minutes compile resume allow_changes log_interval animation".split()
)
PRESET_FLAGS = {
    # Minutes on two CPU cores, no download: shapes of every class. With --adam_beta1 0.9 it takes half as many steps
    # again (docs/recipes.md); 8 steps of dpmpp_2m give what 30 of ddim did (docs/samplers.md).
    "quick": "--dataset shapes --schedule cosine --dim_mults 1 2 2 --class_free_guidance --epochs 2 "
    "--batch_size 16 --adam_beta1 0.5 --eval_images 64 --sampler dpmpp_2m --eta 1 --sample_steps 8",
    # CIFAR-10 in minutes on a data-centre GPU, in an evening on a small one; README has measured speeds.
    "exercise": "--schedule cosine --dim 64 --dim_mults 1 2 2 2 --class_free_guidance --epochs 50 --batch_size 128 "
    "--lr 5e-4 --ema_images 200_000 --sampler dpmpp_2m --eta 1 --sample_steps 50",
    # CIFAR-10 in an hour or two on a data-centre GPU. Width and multipliers are those of Ho et al. 2020.
    "best": "--schedule cosine --dim 128 --dim_mults 1 2 2 2 --dropout 0.1 --class_free_guidance --epochs 200 "
    "--batch_size 128 --lr 2e-4 --warmup_steps 1000 --ema_images 1_000_000 --sampler dpmpp_2m --eta 1 "
    "--sample_steps 100",
    # 2.5, at 128 pixels on a GPU of 11 GB: the activations of 16 images take 5.7 GiB.
    "butterflies": "--dataset butterflies --square pad --schedule cosine --dim 64 --dim_mults 1 2 4 4 "
    "--epochs 500 --batch_size 16 --lr 2e-4 --ema_images 20_000 --eval_images 64 --sampler ddim --eta 1 "
    "--sample_steps 100 --sample_batch 16",
}


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors of one line and without abbreviated flags. It takes -5e-1 for a number on every Python."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def path(text: str) -> str:
    """The type of paths on the command line that are not settings."""
    try:
        return expand_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_flags(parser: argparse.ArgumentParser, groups: tuple[str, ...], leave_out=(), saved: bool = False) -> None:
    """A flag for every Config field of `groups`; only flags that the user gave appear in the parsed namespace.

    Args:
        leave_out: names of fields without one.
        saved: what is not given comes from the checkpoint.
    """
    titles = {group: parser.add_argument_group(group) for group in groups}
    for f in fields(Config):
        rules = f.metadata
        if rules["group"] not in groups or f.name in leave_out:
            continue
        group, name = titles[rules["group"]], f"--{f.name}"
        default = "" if f.default is None else f" (default: {f.default})"
        text = rules["help"]
        if saved and f.name not in ("dry_run", "num_threads", "cuda"):
            text, default = text.split(" (default")[0], " (default: the checkpoint's)"
        if kind_of(f) is bool:  # an on and an off form
            group.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text + default)
            off = f"--no_{f.name}"
            opposite = rules.get("off", "its opposite")
            group.add_argument(off, dest=f.name, action="store_false", default=argparse.SUPPRESS, help=opposite)
        else:
            if "choices" in rules:
                default = f": {', '.join(rules['choices'])}{default}"
            kind = {"type": kind_of(f), "nargs": rules.get("nargs"), "metavar": f.name.upper()}
            group.add_argument(name, **kind, default=argparse.SUPPRESS, help=text + default)


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that starts from a checkpoint."""
    parser.add_argument("--checkpoint", type=path, required=True, help="a run's folder, or its ckpt.pt")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="ema", help="EMA weights, or raw ones as last trained (default: ema)"
    )


def add_samples_flags(parser: argparse.ArgumentParser, default_scales: str) -> None:
    """The flags of every command that evaluates samples."""
    parser.add_argument("--eval_samples", type=int, default=1000, help="samples to evaluate (default: 1000; 0: none)")
    help = f"guidance scales to evaluate them at (default: {default_scales})"
    parser.add_argument("--eval_scales", type=float, nargs="+", default=[], help=help)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace: `command`, its own flags, `given` (the Config fields named), `called` (as text).

    `train` is what runs when no command is named.
    """
    parser = OneLineParser(
        prog="ex2_main.py",
        description="Train, test and sample a DDPM (exercise 2).",
        epilog="Flags without a command are train's; `ex2_main.py train --help` lists them.",
    )
    commands = parser.add_subparsers(dest="command", parser_class=OneLineParser)

    train = commands.add_parser("train", help="train, test and draw every picture (what runs when no command is named)")
    preset = {"choices": tuple(PRESET_FLAGS), "help": "settings to start from; flags beside it still count"}
    train.add_argument("--preset", **preset)
    add_flags(train, GROUPS)

    test = commands.add_parser("test", help="evaluate a checkpoint: losses, bits per dimension, quality of its samples")
    add_checkpoint_flags(test)
    add_samples_flags(test, "-1 0 1 3")
    test.add_argument("--inception_weights", type=path, metavar="FILE", help="torch-fidelity's weights, for FID")
    test.add_argument("--out", type=path, help="folder for the metrics (default: the run's folder)")
    # Another seed would split the data anew, and training images would land in the validation set.
    add_flags(test, ("run", "access to the data", "evaluation", "sampling"), (*RUN_FLAGS_OF_TRAIN, "seed"), saved=True)

    sample = commands.add_parser("sample", help="draw images from a checkpoint")
    add_checkpoint_flags(sample)
    sample.add_argument("--n_images", type=int, default=16, help="how many in all (default: 16)")
    sample.add_argument("--classes", nargs="+", help="class names or numbers, one after the other (default: all)")
    sample.add_argument("--out", type=path, help="folder for the images (default: samples/ in the run's folder)")
    add_flags(sample, ("run", "sampling"), (*RUN_FLAGS_OF_TRAIN, "guidance_scale"), saved=True)
    help = "w of Eq. 11; several are drawn from the same noise (default: 1 for class-conditional models)"
    sample.add_argument("--guidance_scale", dest="scales", type=float, nargs="+", help=help)
    sample.add_argument(
        "--start_image", type=path, metavar="FILE", help="noise this image and denoise it, as the classes"
    )
    help = "of T, how far the start image is noised, to a timestep that is sampled (default: 0.6)"
    sample.add_argument("--start_fraction", type=float, help=help)

    compare = commands.add_parser("compare", help="train and evaluate a run for every combination of settings")
    compare.add_argument("--preset", **preset)
    help = "a setting and its values, for example schedule=linear,cosine; several --vary make all combinations"
    compare.add_argument("--vary", action="append", required=True, metavar="SETTING=VALUE,...", help=help)
    help = "runs of each setting; from 2 on the tables have 95%% intervals (default: 1)"
    compare.add_argument("--seeds", type=int, default=1, help=help)
    add_samples_flags(compare, "the run's own")
    add_flags(compare, GROUPS, ("save_model",))

    export = commands.add_parser("export", help="a checkpoint as a page that samples, as safetensors or as ONNX")
    add_checkpoint_flags(export)
    export.add_argument("--out", type=path, help="folder for the file (default: the run's folder)")
    formats = {"choices": ("page", "safetensors", "onnx"), "default": "page"}
    export.add_argument("--format", **formats, help="live.html (default), model.safetensors or model.onnx")
    help = "how live.html holds the weights (default: float16; int8 is half as large, float32 exact)"
    export.add_argument("--weights_as", choices=("float16", "int8", "float32"), help=help)

    report = commands.add_parser("report", help="everything under a results folder as one page")
    report.add_argument("--results_dir", type=path, default="results", help="folder of all runs (default: results)")

    check = commands.add_parser("check", help="check solutions of the exercise against its equations")
    help = "folders with ex02_diffusion.py, ex02_model.py, ex02_main.py (or ex2_...)"
    check.add_argument("folders", type=path, nargs="+", metavar="FOLDER", help=help)
    check.add_argument("--csv", type=path, metavar="FILE", help="a row for each submission and fact")
    json = {"type": path, "nargs": "?", "const": "-", "metavar": "FILE"}
    check.add_argument("--json", **json, help="the same as JSON; without FILE in place of the table")
    check.add_argument("--jobs", type=int, default=1, help="submissions at a time (default: 1)")
    help = "CPU seconds for each fact, ten times as many on the clock (default: 30)"
    check.add_argument("--time_limit", type=float, default=30, help=help)

    called = shlex.join(["python", "ex2_main.py", *argv])
    if not argv or (argv[0] not in commands.choices and argv[0] not in ("-h", "--help")):
        argv = ["train", *argv]
    args, unknown = parser.parse_known_args(argv)
    names = {f.name for f in fields(Config)}
    for flag in unknown:
        refuse(flag, args.command, {*commands.choices, *commands.choices[args.command]._option_string_actions}, names)
    args.given = {name: value for name, value in vars(args).items() if name in names}
    args.called = called
    return args


def refuse(word: str, command: str, known: set[str], settings: set[str]) -> None:
    """Raises the InputError for a word of the command line that a command doesn't know."""
    name = word.split("=")[0]
    if name.startswith("--") and name[2:].replace("no_", "", 1) in settings:
        if command in ("test", "sample", "export"):
            raise InputError(f"{name} is fixed by the checkpoint and can't be given to {command}: train with it")
        raise InputError(f"{name} is not for {command}")
    near = difflib.get_close_matches(name, known, 1, cutoff=0.75)
    advice = f": did you mean {near[0]}?" if near else f" (see ex2_main.py {command} --help)"
    raise InputError(f"{command} does not know {word}{advice}")


def config_of_flags(args: argparse.Namespace) -> Config:
    """The Config of `train` and `compare`: flags of the preset, replaced by those that were given."""
    return preset_config(args.preset, **args.given)


def preset_config(name: str | None, **given) -> Config:
    """The settings of a preset, with others in place of them; what depends on the data set follows the one in use."""
    flags = parse_args(["train", *PRESET_FLAGS[name].split()]).given if name else {}
    if "sampler" in given:
        flags.pop("eta", None)  # which is that of the preset's sampler
    return Config(**{**({"run_name": name} if name else {}), **flags, **given})


def choose_classes(wanted: list[str] | None, names: list[str], config: Config) -> list[int] | None:
    """Labels for the names or numbers in `wanted`, all of them where it is None; None for an unconditional model."""
    if not config.class_free_guidance:
        if wanted:
            raise InputError("--classes: this model is unconditional; train one with --class_free_guidance")
        return None
    by_name = {unicodedata.normalize("NFC", name): i for i, name in enumerate(names)}
    labels = []
    for name in [unicodedata.normalize("NFC", name) for name in wanted or names]:
        if name not in by_name and name.isdecimal() and int(name) < len(names):
            print(f"--classes {name}: no class has that name, so it is number {name}: {names[int(name)]}")
            labels.append(int(name))
        elif name in by_name:
            labels.append(by_name[name])
        else:
            raise InputError(f"--classes: unknown class {name!r}; the model knows {', '.join(names)}")
    return labels


def check_scales(args) -> list[float]:
    """The guidance scales at which samples are evaluated, as far as they were given."""
    if not 0 <= args.eval_samples <= MAX_EVALUATED:
        raise InputError(f"--eval_samples must be at least 0 and at most {MAX_EVALUATED}, got {args.eval_samples}")
    if args.eval_samples == 0 and args.eval_scales:
        raise InputError("--eval_scales are for evaluated samples: drop --eval_samples 0")
    for scale in args.eval_scales:
        if not -1000 <= scale <= 1000:
            raise InputError(f"--eval_scales must lie within -1000 .. 1000, got {scale:g}")
    return args.eval_scales


def choose_scales(args, config: Config) -> list[float]:
    """The guidance scales at which `test` evaluates samples; checks its other flags for them too."""
    scales = check_scales(args)
    if args.eval_samples == 0 and args.inception_weights:
        raise InputError("--inception_weights are for evaluated samples: drop --eval_samples 0")
    if config.can_guide:
        return scales or list(GUIDANCE_SCALES)
    if scales:
        raise InputError("--eval_scales: this model can't be guided; train one with --class_free_guidance")
    return []


def parse_vary(texts: list[str]) -> dict[str, list]:
    """{"lr": [0.001, 0.003]} from ["lr=0.001,0.003"], each value of its setting's type.

    Raises InputError: no setting that can be varied, or a value that it doesn't take.
    """
    rules = {f.name: f for f in fields(Config) if f.metadata["group"] in VARIABLE_GROUPS}
    rules = {name: f for name, f in rules.items() if "nargs" not in f.metadata}
    varied: dict[str, list] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in rules or not values:
            raise InputError(f"--vary {text}: give setting=value,value,... with one of {', '.join(sorted(rules))}")
        if name in varied:
            raise InputError(f"--vary names {name} twice: give all its values at once, separated by commas")
        kind = kind_of(rules[name])
        parse = kind if kind is not bool else lambda value: {"true": True, "false": False}[value.lower()]
        try:
            varied[name] = [parse(value) for value in values.split(",")]
        except (ValueError, KeyError):
            raise InputError(f"--vary {text}: every value must be of type {kind.__name__}") from None
        if len(set(varied[name])) != len(varied[name]):
            raise InputError(f"--vary {text}: a value is there twice")
    return varied
