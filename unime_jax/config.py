"""Configuration: every key with its default, unit and meaning, and the checks before any work.

A file in `configs/` edits `base_config()`; flags override single keys; `parse` turns both into a
resolved, locked `ConfigDict`. A `ConfigDict` never goes further down than the entries.
"""

import pathlib
import re
import sys

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from unime_jax import config_errors, config_values
from unime_jax.types import UserError

STAGES = ("distill", "align", "contrast", "judge")


def base_config() -> ConfigDict:
    """Returns every key of a training run with its default, locked: others cannot be set."""
    c = ConfigDict()
    c.seed = 0  # parameters' initial values, order of the data, dropout
    c.output = ""  # directory of the run: checkpoints, metrics, resolved config
    # A run or PEFT adapter whose trained parameters are this run's first ones; optimiser, steps and
    # data start anew. (A run that is started again goes on from its own checkpoint.)
    c.init_from = ""
    c.stage = "contrast"  # distill (stage 1), align (the projector alone), contrast (stage 2), or
    # judge (stage 2 with a judge's scores of each row's own hard negatives)

    c.model = ConfigDict()
    c.model.path = ""  # HF directory, or a run: its newest checkpoint when this one begins
    c.model.dtype = "float32"  # of the frozen base and of the computation: float32 or bfloat16
    # auto (the fastest of the platform), xla (the reference, anywhere), cudnn (GPU), splash (TPU)
    c.model.attention = "auto"
    c.model.remat = "none"  # kept inside a chunk's layers: none (all), dots, full (nothing)

    c.data = ConfigDict()
    # Directory written by `prepare`, nli_for_simcse.csv, or pairs of your own: lines of
    # {"image": path, "text": ...} (.jsonl), or rows of data/task_pairs.py (.jsonl .json .parquet).
    c.data.path = ""
    c.data.max_tokens = 64  # longest row in tokens, prompt included, image features excluded
    c.data.prompt = ""  # key of data/prompts.py: TEMPLATES; "": the backbone's own
    # Of a row's image and text: together (one prompt) or sum (of two vectors); "": sum for models
    # that were trained on texts alone. For whoever uses the trained model.
    c.data.fusion = ""
    c.data.image_size = 0  # images are resized to so many pixels square first; 0: as they are
    c.data.image_crops = 0  # most tiles of an image (Phi-3.5-V); 0: the checkpoint's number
    c.data.sets = ()  # names of MMEB's sets to train on; empty: all that are prepared
    c.data.set_rows = 0  # first rows of each set (the paper's 50000 are `prepare`'s); 0: all
    c.data.images = ""  # directory that image paths of own pairs start from; "": beside the file
    c.data.image_root = ""  # no image outside of it is read; "": data.images, or beside the file
    c.data.block = 0  # rows of a set come in multiples of it, one block or more; 0: any number
    c.data.length_bins = 2  # most padded lengths of a batch's texts, and of its images' rows
    c.data.joint_bins = True  # the same ones for queries, targets and negatives; else each its own
    c.data.directions = ("image_to_text",)  # of image-text pairs: image_to_text, text_to_image
    c.data.weights = ()  # (("set", share), ...) of the batch; empty: proportional to size
    c.data.temperature = 1.0  # shares ~ size ** (1 / temperature); inf would be equal shares
    c.data.extra_texts = 0.0  # probability of a keyword text in place of a pair's caption
    c.data.threads = 2  # readers decoding images ahead of the step, in each process that reads
    c.data.workers = 0  # processes that read; 0: the threads run in the training process
    c.data.features = ""  # directory of cached vision features (frozen tower); "": run the tower
    c.data.variants = 1  # cached views of an image: 1 is the image itself, more are flips and crops
    c.data.max_bad_share = 0.01  # unreadable rows tolerated before the run stops, 0 to 1

    c.teacher = ConfigDict()
    c.teacher.path = ""  # HF directory of the text teacher (`teach`)
    c.teacher.instruction = ""  # task of NV-Embed's query form; "": plain passages
    c.teacher.vectors = ""  # directory of its vectors (written by `teach`, read by stage 1)

    c.loss = ConfigDict()
    c.loss.temperature = 0.02  # divides cosines
    c.loss.kl_direction = "teacher_to_student"  # or student_to_teacher
    c.loss.kl_diagonal = True  # a row's similarity to itself in the softmax (see distill_kl)
    c.loss.k = 8  # hard negatives per query; 0: every target of the batch (InfoNCE)
    c.loss.margin = 0.1  # above the positive's cosine a candidate is a false negative
    c.loss.shortage = "duplicate"  # fewer than k survivors: duplicate (the paper) or mask
    c.loss.mask_equal_targets = True  # the same target again is no negative; False: as the paper
    c.loss.negatives = "hard"  # hard, random or easy (the paper's Fig. 5)

    c.train = ConfigDict()
    c.train.steps = 1000
    c.train.epochs = 0.0  # passes over the data, in place of steps; 0: steps
    c.train.batch_size = 1024  # rows whose similarities meet in one loss; stage 1: sentences
    c.train.chunk = 0  # longest rows encoded at a time, shorter ones in proportion more; 0: all
    c.train.trainable = ()  # regexes on parameter paths, besides the adapters
    # The frozen decoder in 4 or 8 bits (QLoRA): nf4 or int8; None: in model.dtype.
    c.train.quantize = config_dict.placeholder(str)
    c.train.feature_dropout = 0.0  # on the vision features that a unime_smol's projector reads
    c.train.replay = 0  # a step of a run to take again and look into, writing nothing; 0: train
    c.train.adapters = ConfigDict()
    c.train.adapters.rank = 16  # 0: no adapters
    c.train.adapters.alpha = 64.0  # the update is scaled by alpha / rank
    c.train.adapters.dropout = 0.0  # on the adapters' input
    c.train.adapters.vision = False  # adapters on the vision tower as well, as VLM2Vec has them
    c.train.adapters.targets = r"language_model/.*(q|k|v|o|qkv|gate|up|gate_up|down)_proj$"

    c.optim = ConfigDict()
    c.optim.learning_rate = 1e-4  # peak
    c.optim.multipliers = ()  # ((regex on paths, factor), ...); the first match counts
    c.optim.schedule = "linear"  # after the warm-up: linear or cosine to 0, or constant
    c.optim.warmup_steps = 100
    c.optim.warmup_share = 0.0  # of all steps, in place of warmup_steps; 0: warmup_steps
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 1.0  # global norm of the gradient; 0: no clipping
    c.optim.spike_factor = 0.0  # times the median loss at which an update is skipped; 0: never
    c.optim.spike_window = 32  # last losses that the median is of; no skipping before so many

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 100  # 0: by time alone
    c.checkpoint.every_seconds = 600.0  # at the first step after so long; 0: by steps alone
    c.checkpoint.keep = 2  # newest checkpoints kept
    c.checkpoint.keep_best = 0  # kept besides: those best by a metric of config.eval.every_steps
    c.checkpoint.best_metric = ""  # such as validation/image_to_text_recall_at_10
    c.checkpoint.best_mode = "max"  # which is best: max or min

    c.log = ConfigDict()
    c.log.every_steps = 1
    c.log.tensorboard = True
    c.log.profile = ""  # steps to trace, "10-12", into output/profile; "": none

    c.eval = ConfigDict()
    c.eval.every_steps = 0  # measures on the held-out part of `prepare smol`'s data; 0: never

    c.mesh = ConfigDict()  # devices along each axis; -1 takes what is left
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.tensor = 1
    return c.lock()


def evaluation_config() -> ConfigDict:
    """Returns every key of an evaluation on published sets with its default, locked."""
    c = ConfigDict()
    c.benchmark = ""  # mmeb or retrieval
    c.output = ""  # directory of report.md, report.json, plots and answers
    c.sets = ""  # names, separated by commas; "": all
    c.limit = 0  # of each set so many queries or images; 0: all
    c.images = ""  # directory that the images' paths start from; retrieval: "": beside the sets
    c.before = ""  # mmeb: output of an earlier evaluation, drawn as "before"; "": chance
    c.cache = ""  # vectors of all models and benchmarks; "": ~/.cache/unime_jax/vectors
    c.image_root = ""  # no image outside of it is read, by no link; "": the directory of the images

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face directory or hub id, run, PEFT adapter
    c.model.dtype = "bfloat16"  # of parameters and computation: float32 or bfloat16

    # How rows become inputs; left open, as the model was trained, else as the published evaluation.
    # Texts are never cut: the published run of Phi-3.5-V on MMEB cuts those without an image at 256
    # tokens, that of LLaVA-1.6 at 4096.
    c.data = ConfigDict()
    c.data.path = ""  # directory of the sets
    c.data.prompt = ""  # key of data/prompts.py: TEMPLATES; "": the published evaluation's
    c.data.fusion = ""  # of an image with a text: together, or sum (models of stage 1)
    c.data.image_size = config_dict.placeholder(int)  # side of a square; 0: images as they are
    c.data.image_crops = config_dict.placeholder(int)  # most crops (Phi-3.5-V); 0: the checkpoint's

    # Every process loads the model on its own devices. Whole copies need no gathers; where a device
    # is too small for one: --config.mesh.data=1 --config.mesh.fsdp=-1.
    c.mesh = ConfigDict()
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    return c.lock()


def parse(argv: list[str], doc: str) -> ConfigDict:
    """Reads `--config FILE[:ARG]` and `--config.key=value` overrides.

    Args:
      argv: the command line, program name first.
      doc: what `--help` prints above the keys.

    Raises:
      UserError: an unknown flag, key or variant, a value of another type, a config file that fails.
    """
    if len(argv) < 2 or any(a in ("-h", "--help", "-help") for a in argv[1:]):
        print(doc.strip())
        sys.exit(0)
    rest, config = _load(argv)
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; overrides are --config.key=value")
    if config is None:
        raise UserError("--config FILE is missing; configs/ has one file per run")
    _check_variant(argv)
    return config


def _check_variant(argv: list[str]) -> None:
    """Raises `UserError` where FILE:ARG is no other than FILE: a typo would start the whole run."""
    file = [word for word in argv if not word.startswith("--config.")]  # no key set beside it
    without = [re.sub(r"\.py:.+", ".py", word) for word in file]
    if without == file:
        return
    try:
        plain, varied = _load(without)[1], _load(file)[1]
    except UserError:  # a file of which there are variants alone
        return
    named = next(word for word in file if word not in without).removeprefix("--config=")
    check(
        plain != varied,
        f"{named}: no such variant, it is the same as without; the file's first lines say which "
        "there are",
    )


def _load(argv: list[str]) -> tuple[list[str], ConfigDict | None]:
    """Returns what is left of the command line, program name first, and the configuration.

    Raises:
      UserError: see `parse`.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", flag_values=values, sys_argv=argv, lock_config=True, accept_new_attributes=False
    )
    try:
        rest = values(argv)
        config = values.config
        if values["config"].present and not isinstance(config, ConfigDict):
            getattr(config, "keys", None)  # of a file that failed: raises at its first use
            config_errors.refuse(config, argv)
        config_errors.check_swallowed(config, argv)
    except UserError:
        raise
    except Exception as error:  # absl, importlib and ml_collections each raise their own kinds
        raise UserError(config_errors.explain(error, argv)) from error
    return rest, config


def check(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_keys(config: ConfigDict, known: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Checks keys as `config_values.misnamed` does."""
    problem = config_values.misnamed(config.to_dict(), known, optional)
    check(not problem, problem)


def check_like(config: ConfigDict, known: ConfigDict) -> None:
    """Checks that keys and kinds of values are those of another configuration."""
    problem = config_values.unlike(config.to_dict(), known.to_dict())
    check(not problem, problem)


def check_choice(config: ConfigDict, key: str, choices: tuple[str, ...]) -> None:
    value = lookup(config, key)
    check(value in choices, f"config.{key}={value!r}: choose one of {', '.join(choices)}")


def lookup(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def check_path(config: ConfigDict, key: str) -> None:
    """Checks that the key names an existing path."""
    path = lookup(config, key)
    check(bool(path), f"config.{key} is empty; give a path with --config.{key}=PATH")
    exists = pathlib.Path(path).expanduser().exists()
    check(exists, f"config.{key}={path}: no such file or directory")


def check_profile(wanted: str) -> None:
    """Checks the steps of `config.log.profile`."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", wanted)
    check(
        not wanted or bool(found and 1 <= int(found[1]) <= int(found[2] or found[1])),
        f'config.log.profile={wanted}: give the steps to trace as "10-12", or "" for none',
    )


def validate_train(config: ConfigDict) -> None:
    """Checks a training run's values, and that its files are there.

    Raises:
      UserError: the first impossible value or missing file, named with its key.
    """
    validate_values(config)
    check_path(config, "model.path")
    check_path(config, "data.path")
    for key in ("data.images", "data.image_root"):
        path = lookup(config, key)
        there = not path or pathlib.Path(path).expanduser().is_dir()
        check(there, f"config.{key}={path}: no such directory")
    if config.stage == "distill":
        check_path(config, "teacher.vectors")
        if config.eval.every_steps:
            check_path(config, "teacher.path")  # for the held-out sentences


def validate_keys(config: ConfigDict) -> None:
    """Checks keys and values that training and teaching share, whatever the stage.

    Raises:
      UserError: the first key or value that no run could use, named.
    """
    check("stage" in config, "this is no configuration of a training run: it has no config.stage")
    known = base_config()
    for key in config_values.nothings(config.to_dict(), known.to_dict()):
        config.update_from_flattened_dict({key: ""})
    check_like(config, known)
    for key in ("sets", "directions"):
        config.data[key] = config_values.split(config.data[key])
    problem = config_values.problem(config.to_dict())
    check(not problem, problem)


def validate_values(config: ConfigDict) -> None:
    """Checks all that needs no file.

    Raises:
      UserError: the first impossible value, named with its key.
    """
    validate_keys(config)
    check_choice(config, "stage", STAGES)
    check_choice(config, "model.dtype", ("float32", "bfloat16"))
    check_choice(config, "model.attention", ("auto", "xla", "cudnn", "splash"))
    check_choice(config, "model.remat", ("none", "dots", "full"))
    check_choice(config, "loss.kl_direction", ("teacher_to_student", "student_to_teacher"))
    check_choice(config, "data.fusion", ("", "together", "sum"))
    check_choice(config, "loss.shortage", ("duplicate", "mask"))
    check_choice(config, "loss.negatives", ("hard", "random", "easy"))
    if config.train.quantize == "None":  # as a flag
        config.train.quantize = None
    if config.train.quantize is not None:
        check_choice(config, "train.quantize", ("nf4", "int8"))
    check_choice(config, "optim.schedule", ("linear", "cosine", "constant"))
    factor = config.optim.spike_factor
    check(
        factor == 0 or factor > 1,
        f"config.optim.spike_factor={factor}: must be above 1, or 0 to skip no update",
    )
    check_choice(config, "checkpoint.best_mode", ("max", "min"))
    if config.checkpoint.keep_best:
        check(
            config.eval.every_steps > 0 and bool(config.checkpoint.best_metric),
            f"config.checkpoint.keep_best={config.checkpoint.keep_best}: needs "
            "config.checkpoint.best_metric, and config.eval.every_steps to measure it",
        )
    check_profile(config.log.profile)
    check(len(config.data.directions) > 0, "config.data.directions is empty; name one or both")
    for direction in config.data.directions:
        check(
            direction in ("image_to_text", "text_to_image"),
            f"config.data.directions: {direction!r} is neither image_to_text nor text_to_image",
        )
    check(
        not config.data.workers
        or (config.stage in ("contrast", "judge") and not config.data.features),
        f"config.data.workers={config.data.workers}: processes read the images of stage 2 alone; "
        "with cached features or in other stages set it to 0",
    )
    if config.stage == "judge":
        check(config.loss.k > 0, "config.loss.k=0: the number of judged negatives of each row")
    batch, chunk, k = config.train.batch_size, config.train.chunk, config.loss.k
    check(batch >= 2, f"config.train.batch_size={batch}: a contrastive batch needs 2 rows or more")
    if config.stage == "contrast":
        check(k < batch, f"config.loss.k={k}: must be below config.train.batch_size={batch}")
    check(chunk <= batch, f"config.train.chunk={chunk} is larger than train.batch_size={batch}")
    if chunk:
        check(
            batch % chunk == 0,
            f"config.train.chunk={chunk} does not divide config.train.batch_size={batch}",
        )
    check(
        config.train.adapters.rank > 0 or len(config.train.trainable) > 0,
        "nothing to train: config.train.adapters.rank is 0 and config.train.trainable is empty",
    )
    check(
        config.checkpoint.every_steps > 0 or config.checkpoint.every_seconds > 0,
        "config.checkpoint: every_steps and every_seconds are both 0, nothing would be saved",
    )
    check(bool(config.output), "config.output is empty; name a directory with --config.output=DIR")


def describe(config: ConfigDict) -> str:
    """Returns the resolved config for people, a line for each section."""
    settings = config.to_dict()
    top = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    sections = {"run": top, **{k: v for k, v in settings.items() if isinstance(v, dict)}}
    lines = [f"{name:<12}{_settings(values)}" for name, values in sections.items()]
    return "\n".join(lines)


def _settings(values: dict, prefix: str = "") -> str:
    parts = []
    for key, value in values.items():
        nested = isinstance(value, dict)
        parts.append(_settings(value, f"{key}.") if nested else f"{prefix}{key}={value}")
    return "  ".join(parts)
