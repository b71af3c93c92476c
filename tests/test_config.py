"""The loader: what a config file may say, and what a person reads when it says something else."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flowrl.config import Config, dump_config, list_methods, load_config
from flowrl.mistakes import did_you_mean, leaf_keys
from flowrl.sections import RewardConfig
from flowrl.types import UserError

MINIMAL = "run_dir: runs/x\nrewards: [scene]\n"


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    return str(caught.value).split("\n")


def test_a_file_lies_over_its_method_and_overrides_lie_over_the_file(write) -> None:
    path = write(MINIMAL + "method: flow_grpo_fast\nrollout: {num_steps: 12, group_size: 4}\n")
    rollout = load_config(path, ["rollout.num_steps=14"]).rollout
    assert (rollout.num_steps, rollout.group_size, rollout.plan) == (14, 4, "window")
    assert load_config(path, ["method=flow_grpo"]).rollout.plan == "chain"


def test_without_a_method_the_file_gets_flow_grpo(write) -> None:
    config = load_config(write(MINIMAL))
    assert (config.method, config.kl.weight, config.rollout.guidance_scale) == ("flow_grpo", 0.04, 4.5)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("ema=null", "ema", None),
        ("rollout.shift=", "rollout.shift", None),
        ("rollout.same_noise=true", "rollout.same_noise", True),
        ("run_dir=a=b", "run_dir", "a=b"),
        ("rollout={num_steps: 6}", "rollout.group_size", 24),
        ("model.lora.targets=[to_q, to_k]", "model.lora.targets", ("to_q", "to_k")),
        ("data.eval={mine: a.txt}", "data.eval", {"mine": "a.txt"}),
        ("rewards={jpeg: 2}", "rewards", (RewardConfig(name="jpeg", weight=2.0),)),
        ("rewards[0]={name: jpeg}", "rewards", (RewardConfig(name="jpeg"),)),
    ],
)
def test_an_override_has_the_type_that_yaml_gives_it(write, override: str, path: str, value: object) -> None:
    found: object = load_config(write(MINIMAL), [override])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_a_mapping_override_adds_to_a_section_and_replaces_what_the_user_named(write) -> None:
    path = write("run_dir: r\nrewards: {scene: 1.0}\ndata: {eval: {a: a.txt}}\nevaluation: {seed: 3}\n")
    config = load_config(path, ["rewards={jpeg: 1.0}", "data.eval={b: b.txt}", "evaluation={every: 7}"])
    assert [reward.name for reward in config.rewards] == ["jpeg"]
    assert config.data.eval == {"b": "b.txt"}
    assert (config.evaluation.seed, config.evaluation.every) == (3, 7)
    assert load_config(path, ["data.eval.b=b.txt"]).data.eval == {"a": "a.txt", "b": "b.txt"}


def test_overrides_are_applied_in_order(write) -> None:
    assert load_config(write(MINIMAL), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': write key=value, for example rollout.num_steps=6"),
        ("=3", "override '=3': write key=value"),
        ("rollout..plan=x", "override 'rollout..plan=x': write key=value"),
        ("seed=[1", "override 'seed=[1': the value is not valid YAML"),
        ("rewards[3].weight=1", "override 'rewards[3].weight=1': rewards is a list; name an entry by its number, 0 to 0"),
        ("rewards.scene=1", "override 'rewards.scene=1': rewards is a list"),
        ("rollout.num_steps.x=1", "rollout.num_steps: {'x': 1} is not a whole number"),
        ("run_dir=???", "run_dir: Missing mandatory value"),
        ("run_dir=${nowhere}", "run_dir: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_malformed_override_is_named(write, override: str, message: str) -> None:
    (line,) = mistakes(write(MINIMAL), override)
    assert line.startswith(message)


@pytest.mark.parametrize(
    "rewards",
    ["[{name: scene, weight: 0.5}, {name: jpeg}]", "{scene: 0.5, jpeg: 1.0}", "{scene: {weight: 0.5, args: {}}, jpeg: {}}"],
)
def test_the_forms_of_a_reward_list_mean_the_same(write, rewards: str) -> None:
    expected = (RewardConfig(name="scene", weight=0.5), RewardConfig(name="jpeg", weight=1.0))
    config = load_config(write(f"run_dir: r\nrewards: {rewards}\nevaluation: {{rewards: {rewards}}}\n"))
    assert config.rewards == config.evaluation.rewards == expected


@pytest.mark.parametrize("form", ["scene", "[scene]", "{name: scene}", "{scene: 1}"])
def test_one_reward_may_be_given_without_a_list(write, form: str) -> None:
    assert load_config(write(f"run_dir: r\nrewards: {form}\n")).rewards == (RewardConfig(name="scene"),)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rollout: {group_sise: 8}", "rollout.group_sise: unknown key; did you mean group_size?"),
        ("group_size: 8", "group_size: unknown key; did you mean rollout.group_size?"),
        (
            "optimizer: {lr: 1}",
            "optimizer.lr: unknown key; known: name, learning_rate, betas, eps, weight_decay, warmup_updates, max_grad_norm",
        ),
        ("ema: {decai: 0.5}", "ema.decai: unknown key; did you mean decay?"),
        ("method: flow_grp", "method: unknown method flow_grp; did you mean flow_grpo?"),
        ("method: 3", "method: 3 is not text; put it in quotes"),
        ("rollout: {group_size: 1}", "rollout.group_size: 1 is too small, a group needs at least 2 samples to compare"),
        ("rollout: {group_size: 7.5}", "rollout.group_size: 7.5 is not a whole number"),
        ("rollout: {group_size: true}", "rollout.group_size: true is not a whole number"),
        ("rollout: {num_steps: ten}", "rollout.num_steps: 'ten' is not a whole number"),
        ("rollout: {num_steps: '10'}", "rollout.num_steps: '10' is not a whole number"),
        ("rollout: {num_steps: 0}", "rollout.num_steps: 0 is out of range; allowed: at least 1"),
        ("rollout: {num_steps: null}", "rollout.num_steps: is empty; give a whole number or remove the line"),
        ("rollout: {noise_level: 0}", "rollout.noise_level: 0 is out of range; allowed: above 0"),
        ("rollout: {noise_level: .nan}", "rollout.noise_level: nan is not a finite number"),
        ("rollout: {train_fraction: 1.5}", "rollout.train_fraction: 1.5 is out of range; allowed: above 0 and at most 1"),
        ("rollout: {same_noise: 1}", "rollout.same_noise: 1 is not true or false"),
        ("rollout: {plan: treee}", "rollout.plan: 'treee' is not a choice; did you mean tree?"),
        ("model: {dtype: bf16}", "model.dtype: 'bf16' is not a choice; did you mean bfloat16?"),
        ("rollout: 3", "rollout: 3 is not a mapping of keys"),
        ("training:", "training: is empty; give a mapping of keys or remove the line"),
        ("optimizer: {betas: [0.9, 1.0]}", "optimizer.betas.1: 1.0 is out of range; allowed: at least 0 and below 1"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas.1: missing"),
        ("model: {lora: {targets: to_q}}", "model.lora.targets: 'to_q' is not a list"),
        ("data: {eval: {a/b: x.txt}}", "data.eval.a/b: 'a/b' is not a name; use letters, digits, _ and -"),
        ("data: {eval: {}}", "data.eval: is empty"),
        ("run_dir: ''", "run_dir: is empty"),
        ("rewards: []", "rewards: is empty"),
        ("rewards: {scene: {weigth: 1}}", "rewards.scene.weigth: unknown key; did you mean weight?"),
        ("rewards: {scene: high}", "rewards.scene.weight: 'high' is not a number"),
        ("rewards: [{name: scene, weigth: 1}]", "rewards.0.weigth: unknown key; did you mean weight?"),
        ("rewards: {name: scene, weigth: 1}", "rewards.weigth: unknown key; did you mean weight?"),
        ("rewards: [{weight: 1}]", "rewards.0.name: missing; give a registered reward, or module:attribute"),
        ("rewards: {scene: 0}", "rewards: every weight is 0, nothing would be learned; give at least one reward another weight"),
        ("rewards: [scene, scene]", "rewards: scene is listed twice; keep one and set its weight, or give each a label"),
        ("model: {height: 64}", "model.height and model.width: give both or neither"),
        (
            "rollout: {groups_per_iteration: 2, group_size: 3}\nobjective: {updates_per_iteration: 7}",
            "objective.updates_per_iteration: 7 is more than the 6 images of an iteration (groups_per_iteration x group_size)",
        ),
        (
            "training: {rows_per_forward: 1}",
            "training.rows_per_forward: with rollout.guidance_scale > 1 every image takes 2 rows; use at least 2",
        ),
        ("rollout: {num_steps: 1}", "rollout.num_steps: 1 leaves nothing to train, the last step is never stochastic; use at least 2"),
        (
            "rollout: {num_steps: 3, train_fraction: 0.3}",
            "rollout.train_fraction: 0.3 of 3 steps is less than one step; use at least 0.334",
        ),
        (
            "rollout: {plan: window, num_steps: 6, window: {size: 4}}",
            "rollout.window.size: 4 does not fit into the 3 steps 0..2; use a smaller size or a larger window.high (at most 5)",
        ),
        (
            "rollout: {plan: window, num_steps: 6, window: {high: 6}}",
            "rollout.window.high: 6 is too large for 6 steps, of which the last is never stochastic; use at most 5",
        ),
        (
            "rollout: {plan: window, num_steps: 6, window: {low: 3}}",
            "rollout.window.low: 3 leaves no step below window.high = 3; use at most 2",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(write, text: str, line: str) -> None:
    kept = [default for default in MINIMAL.splitlines() if default.partition(":")[0] not in text.partition(":")[0]]
    assert mistakes(write("\n".join([*kept, text]))) == [line]


def test_the_advice_of_a_range_message_is_itself_valid(write) -> None:
    assert load_config(write(MINIMAL + "rollout: {num_steps: 3, train_fraction: 0.334}")).rollout.train_fraction == 0.334
    for window in ("{size: 3}", "{size: 4, high: 4}", "{size: 5, high: 5}", "{size: 1, low: 4, high: 5}"):
        assert load_config(write(MINIMAL + f"rollout: {{plan: window, num_steps: 6, window: {window}}}")).rollout.plan == "window"
    images = "rollout: {groups_per_iteration: 2, group_size: 3}\nobjective: {updates_per_iteration: 6}"
    assert load_config(write(MINIMAL + images)).objective.updates_per_iteration == 6


def test_all_mistakes_of_a_file_are_told_at_once(write) -> None:
    lines = mistakes(write("seed: -1\nrollout: {group_sise: 1, num_steps: 0}\nmethod: nope\n"))
    assert [re.match(r"[\w.]+", line)[0] for line in lines] == [  # type: ignore[index]
        "method",
        "run_dir",
        "seed",
        "rewards",
        "rollout.num_steps",
        "rollout.group_sise",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", "line 2: did not find expected"),
        ("a: 1\na: 2", "line 2: found duplicate key a"),
        ("a: !!python/object:os.path {}", "could not determine a constructor"),
        ("a: ${b c", "not valid YAML"),
        ("5", "not a run: write keys with values"),
        ("- 1", "not a run: write keys with values"),
    ],
)
def test_a_file_that_is_not_a_yaml_mapping_is_refused(write, text: str, message: str) -> None:
    path = write(text)
    (line,) = mistakes(path)
    assert line.startswith(f"config {path}: ")
    assert message in line


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "none.yaml") == [f"config {tmp_path / 'none.yaml'}: no such file"]
    assert mistakes(tmp_path) == [f"config {tmp_path}: cannot be read (Is a directory)"]
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: \xe9")
    assert mistakes(tmp_path / "latin.yaml") == [f"config {tmp_path / 'latin.yaml'}: is not UTF-8 text"]


def test_an_environment_variable_can_be_used(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "somewhere")
    assert load_config(write("run_dir: ${oc.env:SCRATCH}/x\nrewards: [scene]")).run_dir == "somewhere/x"


@pytest.mark.parametrize("method", list_methods())
def test_a_dumped_config_loads_as_the_same_config(write, method: str) -> None:
    config = load_config(write(MINIMAL + f"method: {method}\nema: null\nmodel: {{lora: {{targets: [a, b]}}}}\noptimizer: {{eps: 1e-12}}"))
    assert load_config(write(dump_config(config))) == config


@given(st.text(alphabet=st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"])))
@settings(derandomize=True, max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives_the_round_trip_literally(write, text: str) -> None:
    for value in (text, "\\${" + text, "${" + text + "}", "1e3", "yes", "null", "0x10"):
        if value == "???":  # OmegaConf's mark of a value still to be filled in
            continue
        config = Config(run_dir="r", rewards=(RewardConfig(name="scene", args={"value": value}),))
        assert load_config(write(dump_config(config))) == config


_scalars = st.none() | st.booleans() | st.integers(-3, 300) | st.floats(-1, 2) | st.text("ab1.:", max_size=4)
_values = st.recursive(_scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3))


@given(st.dictionaries(st.sampled_from([*leaf_keys(Config), *Config.model_fields]), _values, max_size=4))
@settings(derandomize=True, max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_file_says_the_answer_is_a_config_or_a_user_error(write, entries: dict[str, object]) -> None:
    tree: dict[str, object] = {}
    for path, value in entries.items():
        node, *names = tree, *path.split(".")
        for name in names[:-1]:
            child = node.get(name)
            node[name] = node = child if isinstance(child, dict) else {}
        node[names[-1]] = value
    try:
        assert isinstance(load_config(write(yaml.safe_dump(tree))), Config)
    except UserError as error:
        assert all(re.match(r"\S.*: .", line) for line in str(error).split("\n"))


def test_every_method_file_gives_a_valid_run_and_says_where_it_comes_from(write) -> None:
    methods = list_methods()
    assert {"flow_grpo", "flow_grpo_fast"} <= methods.keys()
    for name, method in methods.items():
        config = load_config(write(MINIMAL), [f"method={name}"])
        assert "arXiv:" in method.paper
        assert method.verified and method.deviations
        sections = {section: value for section, value in config.model_dump().items() if section in method.config}
        for section, values in method.config.items():
            if not isinstance(values, dict | None):
                found = [part["name"] for part in sections[section]] if isinstance(values, list) else sections[section]
                wanted = [part["name"] if isinstance(part, dict) else part for part in values] if isinstance(values, list) else values
                assert found == wanted, (name, section)
                continue
            for key, value in (values or {}).items():
                if not isinstance(value, dict | list):
                    assert sections[section][key] in (value, (value,)), (name, section, key)


def test_method_defaults_do_not_leak_from_one_load_into_the_next(write) -> None:
    before = copy.deepcopy(list_methods())
    load_config(write(MINIMAL), ["rollout.num_steps=8", "optimizer={betas: [0.5, 0.5]}", "ema=null", "method=flow_grpo_fast", "kl.weight=1"])
    assert list_methods() == before


def test_a_suggestion_is_given_only_when_one_is_near() -> None:
    assert did_you_mean("num_step", ["num_steps", "plan"]) == "did you mean num_steps?"
    assert did_you_mean("x", ["num_steps", "plan"]) == "known: num_steps, plan"


def test_the_published_defaults_are_those_of_the_paper() -> None:
    # flow_grpo: SD3.5-M settings of the authors' code: T 10, a 0.7, G 24, 48 groups, CFG 4.5, clip 1e-4, beta 0.04, AdamW 3e-4.
    config = Config.model_validate({"run_dir": "r", "rewards": ["scene"], **list_methods()["flow_grpo"].config})
    rollout = config.rollout
    assert (rollout.num_steps, rollout.noise_level, rollout.group_size, rollout.groups_per_iteration) == (10, (0.7,), 24, 48)
    assert (rollout.guidance_scale, rollout.grid, rollout.same_noise) == (4.5, "diffusers", False)
    assert (config.objective.clip_low, config.objective.clip_high, config.kl.weight, config.kl.form) == (1e-4, 1e-4, 0.04, "fg_code")
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.advantage.clip) == (3e-4, 1e-4, 5.0)


# --- layers


def test_a_config_extends_another_beside_it(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.yaml").write_text(
        "run_dir: runs/a\nrewards: {scene: 1.0, ink: 2.0}\nrollout: {num_steps: 6, group_size: 4}\ndata: {eval: {x: a.txt}}\n"
    )
    (tmp_path / "middle.yaml").write_text("extends: below/base.yaml\nrollout: {group_size: 8}\nseed: 3\n")
    (tmp_path / "top.yaml").write_text("extends: middle.yaml\nrewards: {ink: 1.0}\ndata: {eval: {y: b.txt}}\nseed: 4\n")
    config = load_config(tmp_path / "top.yaml", ["rollout.group_size=2"])
    assert (config.run_dir, config.seed, config.rollout.num_steps, config.rollout.group_size) == ("runs/a", 4, 6, 2)
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("ink", 1.0)]  # rewards and prompt sets are replaced
    assert dict(config.data.eval) == {"y": "b.txt"}
    assert load_config(tmp_path / "middle.yaml").data.eval == {"x": "a.txt"}
    assert "extends" not in dump_config(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: other.yaml", "other.yaml: no such file"),
        ("extends: 3", "`extends` is the path of another config, from this one's folder"),
        ("extends: top.yaml", "`extends` leads back to"),
        ("extends: round.yaml", "`extends` leads back to"),
    ],
)
def test_a_config_that_extends_nothing_usable(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "round.yaml").write_text("extends: top.yaml")
    (tmp_path / "top.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "top.yaml")


def test_off_without_quotes_is_no_to_yaml_and_off_to_compile() -> None:
    base = {"run_dir": "runs/a", "rewards": ["scene"]}
    assert Config.model_validate({**base, "model": {"compile": False}}).model.compile == "off"
    with pytest.raises(ValidationError):
        Config.model_validate({**base, "model": {"compile": True}})
