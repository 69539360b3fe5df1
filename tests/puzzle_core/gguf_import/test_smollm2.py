"""SmolLM2 from the package that carries it, where that is installed: its config, and tokens of its own definition."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from puzzle_core.errors import SpecError
from puzzle_core.gguf_import.gguf_config import gguf_config
from puzzle_core.gguf_import.gguf_metadata import GgufFile
from puzzle_core.gguf_import.gguf_vocabulary import tokenizer_json
from puzzle_core.installed_file import local_path
from puzzle_core.spec_file import load_spec

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def source():
    try:
        return GgufFile(local_path(load_spec(ROOT / "deployments/specs/smollm2.yaml").parent.path))
    except SpecError as error:
        pytest.skip(str(error))


def test_its_config_is_the_one_that_the_golden_of_keys_plans_with(source):
    stored = json.loads((ROOT / "tests/goldens/smollm2/config.json").read_text())
    assert gguf_config(source) == stored


def test_digits_stand_alone_and_special_tokens_have_their_numbers(source):
    """Numbers of the published tokenizer: added tokens, the first bytes and merges, and no merge across digits."""
    content, special = tokenizer_json(source, 49_152)
    tokenizer = Tokenizer.from_str(json.dumps(content))
    assert special["eos_token"] == "<|im_end|>"
    assert tokenizer.encode("<|im_start|>!the 12<|im_end|>").tokens == [
        "<|im_start|>",
        "!",
        "the",
        "Ġ",
        "1",
        "2",
        "<|im_end|>",
    ]
    published = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "!": 17, "0": 32, "Ń": 251, "Ġt": 252}
    published |= {"in": 254, "Ġthe": 260, "ation": 309, "Ġstud": 606, "ings": 616}
    assert {token: tokenizer.token_to_id(token) for token in published} == published
