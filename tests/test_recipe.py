"""Recipes: TOML to dataclasses and back, every field checked, `--set` reaches each of them, the shipped ones read."""

import tomllib
from pathlib import Path

import pytest

from moejax.errors import MoejaxError
from moejax.training import tables
from moejax.training.overrides import overridden
from moejax.training.recipe import Recipe, make_recipe, read_recipe

ROOT = Path(__file__).parents[1]
LEAST = {
    "steps": 3,
    "model": {"config": "a.json"},
    "data": {"batch": 4, "length": 8, "mixture": [{"path": "x.txt"}, {"path": "y.txt", "weight": 2}]},
    "eval": {"data": ["u.txt"]},
}


def made(*settings: str) -> Recipe:
    return make_recipe(overridden(LEAST, settings))


def value_of(recipe: Recipe, name: str):
    value = recipe
    for part in name.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


def another(value, name: str):
    """A valid value of a field other than this one."""
    special = {"losses.balance": "global", "dtype": "float32", "data.batch": 8, "accumulate": 2, "eval.data": ["v.txt"]}
    special |= {"model.config": "b.json", "losses.router": "package.module:function", "losses.jitter": 0.5}
    if name in special:
        return special[name]
    if isinstance(value, bool):
        return not value
    return value + " z" if isinstance(value, str) else value / 2 if isinstance(value, float) and value else value + 1


@pytest.mark.parametrize("name", [n for n in tables.full_names(Recipe) if n not in ("data.mixture", "model.path")])
def test_set_reaches_every_field(name):
    wanted = another(value_of(made(), name), name)
    if name in ("optimizer.beta1", "optimizer.beta2", "losses.balance_weight"):
        wanted = 0.25
    recipe = made(f"{name}={tables.shown(wanted)}")
    got = value_of(recipe, name)
    assert (list(got) if isinstance(got, tuple) else got) == wanted
    assert make_recipe(tomllib.loads(tables.write(recipe))) == recipe
    assert recipe != made()


def test_text_needs_no_quotes_and_the_last_setting_counts():
    assert made("model.tokenizer=some/folder").model.tokenizer == "some/folder"
    assert made("model.tokenizer=12").model.tokenizer == "12"
    assert made('model.tokenizer="a\\"b"').model.tokenizer == 'a"b'
    assert made("optimizer.lr=1", "optimizer.lr = 2").optimizer.lr == 2.0
    assert made('data.mixture=[{path="z"}]').data.mixture[0].path == "z"
    assert made("model.config=", "model.path=demo").model.path == "demo"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lrr=1", "there is no field optimizer.lrr; did you mean optimizer.lr?"),
        ("lr=1", "did you mean optimizer.lr?"),
        ("checkpoint.evry=1", "did you mean checkpoint.every?"),
        ("optimiser.warmup=1", "did you mean optimizer.warmup?"),
        ("optimizer.lr.x=1", "there is no field optimizer.lr.x"),
        ("data.mixture.0.wieght=1", "did you mean data.mixture.0.weight?"),
        ("data.mixture.2.weight=1", "there are 2 entries, numbered from 0"),
        ("data.mixture.x=1", "there is no field data.mixture.x"),
        ("optimizer.lr=abc", "the value is no TOML"),
        ('optimizer.lr="1"', 'optimizer.lr="1" must be a number'),
        ("optimizer.lr=nan", "optimizer.lr=nan must be finite"),
        ("optimizer.lr=0", "optimizer.lr=0.0 must be above 0"),
        ("optimizer.lr=true", "optimizer.lr=true must be a number"),
        ("optimizer.beta2=1", "optimizer.beta2=1.0 must be below 1"),
        ("optimizer.min_lr_ratio=2", "min_lr_ratio=2.0 must be at most 1"),
        ("optimizer.max_skipped=0", "max_skipped=0 must be at least 1"),
        ("optimizer=3", "optimizer=3 must be a table"),
        ("steps=1.5", "steps=1.5 must be a whole number"),
        ("steps=0", "steps=0 must be at least 1"),
        ("steps=1\nseed=2", "the value is no TOML"),
        ("steps", "write it as NAME=VALUE"),
        ("accumulate=3", "data.batch=4 is no multiple of accumulate=3"),
        ("dtype=float16", "dtype=float16 is none of float32, bfloat16"),
        ("model.path=demo", "set one"),
        ("model.config=", "set one"),
        ("data.mixture=[]", "data.mixture is empty"),
        ("data.mixture.0.weight=0", "weight"),
        ("losses.balance=swich", "did you mean 'switch'?"),
        ("checkpoint.keep_last=0", "keep_last=0 must be at least 1"),
    ],
)
def test_mistakes_name_the_field_and_its_value(setting, message):
    with pytest.raises(MoejaxError) as raised:
        made(setting)
    assert message in str(raised.value)


def test_mistakes_in_files(tmp_path):
    with pytest.raises(MoejaxError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = \n")
    with pytest.raises(MoejaxError, match="no valid TOML"):
        read_recipe(tmp_path / "bad.toml")
    with pytest.raises(MoejaxError, match=r"there is no field optimizer\.lrate"):
        make_recipe(LEAST | {"optimizer": {"lrate": 1}})
    with pytest.raises(MoejaxError, match=r"data\.batch is missing"):
        make_recipe(LEAST | {"data": {"length": 8}})
    with pytest.raises(MoejaxError, match=r"eval\.every=5 needs eval\.data"):
        make_recipe(LEAST | {"eval": {"every": 5}})
    with pytest.raises(MoejaxError, match="data=3 must be a table"):
        make_recipe(LEAST | {"data": 3})


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_read(path):
    raw = read_recipe(path)
    if "mixture" not in raw["data"]:
        raw["data"]["mixture"] = [{"path": "README.md"}]
    recipe = make_recipe(raw)
    assert recipe.model.path == "demo" or (ROOT / recipe.model.config).is_file()
