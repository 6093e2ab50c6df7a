"""What `rc-probe --help` says of each option."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
EXAMPLES = """
Examples:

  rc-probe demo                                  the packaged all-MiniLM-L6-v2, bundled texts

  rc-probe bert-base-uncased --data reviews.csv  your own texts

  rc-probe ./my-vit --data photos/               a folder of images

  rc-probe ./my-wav2vec2 --data speech/          a folder of sounds

  rc-probe gpt2 --ablate mlp@7 --ablate head@2:5 the model without a part, beside the whole

  rc-probe gpt2 --paths 5 20 --repeats 5         paths drawn, beside the exact numbers

  rc-probe gpt2 --num-processes 4                the samples shared among four GPUs

  rc-probe t5-small --stack encoder              one stack or tower of several

  rc-probe gpt2 --no-init --json --quiet | jq .verdict

  rc-probe ./new --fail-if 'residual@last<0.1'   exit code 1 where the last layer is collapsed

  rc-probe ./checkpoints                         collapse over training, from a folder of checkpoints

  rc-probe sweep models.txt --data texts.txt     a list of models, one per line, and their comparison

  rc-probe compare RUN RUN …                     results of several models or versions in one report

  rc-probe lm-eval gpt2 --tasks arc_easy --ablate mlp@7   accuracy without a part

  rc-probe architectures llama                   what is proved about which model type
"""
REVISIONS_HELP = (
    "Several, separated by commas: step0,step1000,… Of a folder: checkpoints below it, such as 'checkpoint-*'. Each "
    "is measured, then compared over training. A folder of checkpoints alone needs no option."
)
DATA_HELP = (
    "A txt, jsonl, json, csv, tsv or parquet file, a folder of images or of sounds (wav, flac, ogg, mp3), a Hub "
    "dataset name[:config][:split], or lm-eval:TASK. (default: bundled biographies or photographs)"
)
STACK_HELP = (
    "Encoder, decoder or tower, by its name or a part of it: 'encoder', 'vision'. (default: the last)"
)
MAP_HELP = "For a model larger than one GPU: auto, balanced, balanced_low_0, sequential, or a JSON file of {module: device}."
PROCESSES_HELP = "Share the samples among N processes of this machine, one for each GPU. (default: 1)"
BLOCKS_HELP = "Names of the blocks, where they are not found: 'encoder.layer.*'."
LABEL_HELP = (
    "Column with the correct answers: a class by name or number; for embeddings also a paired text, or TEXT,SCORE. Of a folder "
    "of images or sounds: 'folder', the names of the folders in it."
)
ABLATE_HELP = (
    "Leave a part out and compare: attention.skip@3-5, mlp@7, mlp.skip, attention@all, head@2:5, "
    "block@5-8, mlp@4=0.5. Blocks and heads count from 1. Repeat for more; join parts by '+'."
)
PATHS_HELP = (
    "How much paths of each length do, exactly. With numbers, '--paths 5 20', also sampled and live: so many paths drawn "
    "at each length."
)
FAIL_IF_HELP = (
    "End with exit code 1 if this holds: 'residual@last<0.1', 'cosine@max:SAN>0.99'. METRIC@WHERE[:VARIANT], WHERE "
    "a layer, first, last, min, max or mean; then < <= > >= and a number, in quotes. Repeat for more."
)
BASELINE_HELP = (
    "results.json of an earlier run on the same samples: end with 1 if a layer got worse than there."
)
MAX_DROP_HELP = (
    "Largest allowed drop: 0.05 of the residual (the default), or METRIC[:VARIANT]=NUMBER. Repeat for more."
)
OUT_HELP = "Folder for report.html, results.json and the tables. (default: rc-probe-out/MODEL)"
LOG_HELP = (
    "Also log to a tracker of accelerate: tensorboard, wandb, mlflow, trackio … Curves by layer, one step per layer. "
    "Repeat for more."
)
