"""Credentials in addresses: refused in every text of a spec, by code and by the form, and shown in no log."""

import io
import json
import logging
import re

import pytest
from pydantic import TypeAdapter

from puzzle_core.credentials import SCHEMA_PATTERN, has_credentials, redact_logs, redacted
from puzzle_core.errors import InfeasibleError, PuzzleError, SpecError
from puzzle_core.spec import RunSpec, parse_spec

SECRET = "hunter2"
HOLD = [
    f"https://user:{SECRET}@host/model",
    f"https://{SECRET}@host/model",
    f"https://user:pa/{SECRET}@host",
    f"https:user:{SECRET}@host",
    f"user:{SECRET}@host/path",
    f"postgresql://host/db?password={SECRET}",
    f"postgresql://host/db?sslmode=require&PASSWORD={SECRET}",
    f"https://host/file?token={SECRET}",
    f"https://host/file?hf_token={SECRET}",
    f"https://host/file?client_secret={SECRET}",
    f"https://host/file?api_key={SECRET}",
    f"s3://bucket/text?X-Amz-Signature={SECRET}&x=1",
    f"host=db user=me password={SECRET}",
    f"password={SECRET} host=db user=me",
    f"https://account.blob.host/texts/a.parquet?sv=2024-11-04&sig={SECRET}",
    f"https://host/model#access_token={SECRET}",
    f"https://host/model?JWT={SECRET}",
    f"hf://{SECRET}@org/name",
    f"mysql+pymysql://user:{SECRET}@host/db?charset=utf8",
]
HOLD_NONE = [
    "python-stdlib:train",
    "deployments/parents/stdlib-2m",
    "/models/llama@main",
    "org/name",
    "s3://bucket/prefix",
    "http://mlflow.puzzle.svc:5000",
    "sqlite:////home/me/mlflow.db",
    "postgresql://host:5432/db?sslmode=require",
    "/texts/a?b.txt",
    "tcp://10.0.0.5:8786",
    "node-0:29500",
    "/data/tokens/lang=en/part-0.parquet",
    "tokens/split=train",
    "s3://bucket/design=2/a",
    "60%",
    "6000 tok/s",
    "NVIDIA L40S, 48 GB, data sheet of 2024: p. 3 (https://host/doc.pdf#page=3)",
]


@pytest.mark.parametrize("text", HOLD)
def test_credentials_are_found_and_replaced_wherever_they_stand(text):
    assert has_credentials(text)
    assert not re.search(SCHEMA_PATTERN, text)
    for whole in (text, f"cannot read '{text}', try again", f"{text}\n{text}"):
        assert SECRET not in redacted(whole)
        assert redacted(redacted(whole)) == redacted(whole)


@pytest.mark.parametrize("text", HOLD_NONE)
def test_what_holds_none_is_taken_and_shown_as_it_is(text):
    assert not has_credentials(text)
    assert re.search(SCHEMA_PATTERN, text)
    assert redacted(text) == text


def places(schema, root, place=()):
    """Every text that a schema lets a user give, by its place, with the schema of that text."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if schema.get("type") == "string":
        yield place, schema
    for name, part in schema.get("properties", {}).items():
        yield from places(part, root, (*place, name))
    for part in (*schema.get("anyOf", ()), *schema.get("prefixItems", ())):
        yield from places(part, root, place)
    if isinstance(schema.get("items"), dict):
        yield from places(schema["items"], root, (*place, 0))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from places(schema["additionalProperties"], root, (*place, "other"))


@pytest.mark.parametrize("text", HOLD)
def test_no_text_of_the_form_takes_credentials(text):
    schema = TypeAdapter(RunSpec).json_schema()
    found = dict(places(schema, schema))
    assert {("parent", "path"), ("data", "train_texts", 0), ("runtime", "mlflow_uri"), ("target", "table")} <= set(
        found
    )
    for place, one in found.items():
        taken = text in one["enum"] if "enum" in one else one.get("const") == text if "const" in one else None
        assert taken is False or (taken is None and not re.search(one["pattern"], text)), place


@pytest.mark.parametrize("text", HOLD)
@pytest.mark.parametrize(
    "place", ["parent.path", "data.train_texts", "runtime.mlflow_uri", "runtime.store", "target.table"]
)
def test_a_spec_with_credentials_is_refused_without_repeating_them(text, place):
    part, name = place.split(".")
    content = {"parent": {"path": "p"}, "scenario": {"limits": {"parameters": "90%"}}}
    content.setdefault(part, {})[name] = [text] if name == "train_texts" else text
    if name == "table":
        content["target"]["costs"] = "imported"
    with pytest.raises(SpecError) as error:
        parse_spec(content, "test")
    assert SECRET not in str(error.value)


def test_a_header_and_a_setting_in_a_log_are_redacted():
    for text in (
        f"headers: {{'Authorization': 'Bearer {SECRET}'}}",
        f"Authorization: Basic {SECRET}",
        f"'password={SECRET}'",
        f"HTTP_PROXY=http://me:{SECRET}@proxy:3128 is set",
    ):
        assert SECRET not in redacted(text)
        assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize("text", HOLD)
def test_no_error_shows_credentials(text):
    for error in (PuzzleError, SpecError, InfeasibleError):
        said = str(error(f"cannot reach {text}, try again"))
        assert SECRET not in said
        assert said.startswith("cannot reach ")
    plain = "bld.tokens=512 is not prompt_tokens=128: see 'evaluation.tokens=1'"
    assert str(SpecError(plain)) == plain


def test_no_log_shows_credentials_of_any_logger_nor_in_a_traceback():
    redact_logs()
    redact_logs()
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    for name in ("puzzle", "prefect.flow_runs", "prefect.task_runs", "another"):
        log = logging.getLogger(name)
        log.addHandler(handler)
        try:
            for text in HOLD:
                log.warning("cannot reach %s (%d)", text, 1)
                log.warning(f"cannot reach {text}")
                try:
                    raise ValueError(text)
                except ValueError:
                    log.exception("failed")
            log.warning("all is well at %s", "sqlite:///a.db")
        finally:
            log.removeHandler(handler)
    said = output.getvalue()
    assert SECRET not in said
    assert said.count("ValueError: ") == 4 * len(HOLD)
    assert said.count("cannot reach") >= 8 * len(HOLD)
    assert "all is well at sqlite:///a.db" in said


@pytest.mark.parametrize("name", ["a/b", "../a", "a\nb", "a.", ".a", "", " a", "a ", "a\\b", "a\x00", "a\n"])
@pytest.mark.parametrize("place", ["", "scenario", "target"])
def test_a_name_that_is_no_name_is_refused_by_the_form_and_by_the_spec(name, place):
    content = {"parent": {"path": "p"}, "scenario": {"limits": {"parameters": "90%"}}}
    (content.setdefault(place, {}) if place else content)["name"] = name
    with pytest.raises(SpecError, match="name"):
        parse_spec(content, "test")
    schema = json.loads(json.dumps(TypeAdapter(RunSpec).json_schema()))
    patterns = {where: one["pattern"] for where, one in places(schema, schema) if where[-1] == "name"}
    assert {("name",), ("scenario", "name"), ("target", "name")} <= set(patterns)
    assert not re.search(patterns[(place, "name") if place else ("name",)], name)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "a", "H100 80GB", "chat_bot+long", "7b.v2.1"])
def test_a_name_with_dots_inside_is_a_name(name):
    limits = {"limits": {"parameters": "90%"}}
    parse_spec(
        {"name": name, "parent": {"path": "p"}, "scenario": limits | {"name": name}, "target": {"name": name}}, ""
    )
