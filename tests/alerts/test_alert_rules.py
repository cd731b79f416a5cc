"""Rules: checks of their fields, and their JSON files."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from alert_runs import (
    NAN,
    VALUE,
    plain_rule,
)

from attnmonitor.alerts import (
    DEFAULT_RULES,
    Alerts,
    AllOf,
    AnyOf,
    FiringShare,
    Rule,
    Threshold,
    load_rules,
    save_rules,
)
from attnmonitor.alerts.conditions import subject_of


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"patience": -1}, "rule 'high': patience=-1"),
        ({"patience": 0}, "rule 'high': patience=0"),
        ({"grace": -1}, "rule 'high': grace=-1"),
        ({"scope": "head"}, "rule 'high': scope='head'"),
        ({"scope": "kv_head"}, "rule 'high': scope='kv_head': query_rms belongs to scope 'query_head'"),
        ({"scope": "run"}, "rule 'high': quantile=None"),
        ({"when": AllOf()}, "rule 'high': all_of has no conditions"),
        ({"when": FiringShare()}, "rule 'high': scope='query_head'"),
        ({"when": Threshold(**VALUE, fire_above=1.0, clear_below=2.0)}, "rule 'high': query_rms: .* healthy side"),
        ({"when": Threshold(**VALUE, fire_below=2.0, clear_above=1.0)}, "rule 'high': query_rms: .* healthy side"),
        ({"when": Threshold(**VALUE, fire_above=1.0)}, "rule 'high': query_rms: give fire_above and clear_below"),
        ({"when": Threshold(**VALUE, fire_above=NAN, clear_below=0.0)}, "rule 'high': query_rms: fire_above=nan"),
        ({"when": Threshold("query_rmz", fire_above=1.0, clear_below=0.0)}, "rule 'high': .*'query_rmz'.*query_rms"),
        ({"when": Threshold(**VALUE, fire_above=1.0, clear_below=0.0, gap=0)}, "rule 'high': gap=0"),
    ],
)
def test_invalid_rule_is_an_error_that_names_it(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        plain_rule(**fields)


LEAST = {"patience": 1, "grace": 0, "hold": 0, "least_heads": 1, "until": 1}
LEAST_OF_THRESHOLD = {"window": 1, "gap": 1}


@pytest.mark.parametrize("field", [*LEAST, *LEAST_OF_THRESHOLD])
def test_counts_are_integers_of_at_least_their_minimum(field):
    def rule(value):
        if field in LEAST:
            return plain_rule(**{field: value})
        return plain_rule(when=Threshold(**VALUE, fire_above=1.0, clear_below=0.0, **{field: value}))

    least = (LEAST | LEAST_OF_THRESHOLD)[field]
    rule(least)
    for value in (least - 1, True, float(least)):
        with pytest.raises(ValueError, match=f"rule 'high': {field}={value!r}: must be an integer of at least {least}"):
            rule(value)


def test_bounds_of_levels_quantiles_and_shares():
    Threshold(**VALUE, fire_above=1.0, clear_below=1.0).check("query_head")
    Threshold(**VALUE, fire_below=1.0, clear_above=1.0).check("query_head")
    for quantile in (0.0, 1.0):
        Threshold(**VALUE, fire_above=1.0, clear_below=1.0, quantile=quantile).check("run")
    for quantile in (-0.1, 1.1, None):
        with pytest.raises(ValueError, match=f"quantile={quantile}"):
            Threshold(**VALUE, fire_above=1.0, clear_below=1.0, quantile=quantile).check("layer")
    Threshold(**VALUE, fire_above=1.0, clear_below=1.0, quantile=0.5).check("kv_head")  # of all heads of the model
    with pytest.raises(ValueError, match=r"quantile=0\.5: in a rule about heads it needs signal='value' or 'baseline'"):
        Threshold("query_rms", "change", fire_above=1.0, clear_below=1.0, quantile=0.5).check("query_head")
    FiringShare(heads=1.0, layers=1.0, clear_heads=1.0).check("run")
    for name in ("heads", "layers", "clear_heads"):
        for share in (0.0, 1.01):
            with pytest.raises(ValueError, match=f"{name}={share}: a share must be in"):
                replace(FiringShare(heads=1.0), **{name: share}).check("run")
    with pytest.raises(ValueError, match=r"clear_heads=0\.3 must not exceed heads=0\.25"):
        FiringShare(clear_heads=0.3).check("run")
    with pytest.raises(ValueError, match="AnyOf combines two"):
        Threshold(**VALUE, fire_above=3.0, clear_below=2.0, fire_below=1.0, clear_above=1.5).check("query_head")
    with pytest.raises(ValueError, match="only rules about heads have a source"):
        plain_rule(scope="run", source_only=True, when=FiringShare())


def test_rules_are_values():
    tree = AnyOf(AllOf(Threshold(**VALUE, fire_above=2.0, clear_below=1.0, quantile=0.5), FiringShare()), FiringShare())
    rule = Rule("mine", "test", "run", tree)
    assert len({rule, replace(rule), replace(rule, patience=3)}) == 2
    for record in (rule, tree, *tree.conditions, *rule.thresholds):
        with pytest.raises(FrozenInstanceError):
            setattr(record, fields(record)[0].name, None)


def test_duplicate_names_and_other_objects_are_errors():
    with pytest.raises(ValueError, match="rule 'high': the name is used twice"):
        Alerts([plain_rule(), plain_rule()])
    with pytest.raises(TypeError, match="expected Rule records"):
        Alerts(["high"])


def test_rules_survive_a_file(tmp_path):
    save_rules(DEFAULT_RULES, tmp_path / "rules.json")
    assert load_rules(tmp_path / "rules.json") == DEFAULT_RULES


def test_rule_file_has_only_fields_not_at_default(tmp_path):
    when = AnyOf(Threshold(**VALUE, fire_above=1.0, clear_below=0.5, quantile=0.5), FiringShare(heads=0.5))
    save_rules([Rule("mine", "test", "run", when, grace=3)], tmp_path / "rules.json")
    value = {"metric": "query_rms", "signal": "value", "fire_above": 1.0, "clear_below": 0.5, "quantile": 0.5}
    assert json.loads((tmp_path / "rules.json").read_text()) == [
        {
            "name": "mine",
            "kind": "test",
            "scope": "run",
            "when": {"any_of": [value, {"firing_share": {"heads": 0.5}}]},
            "grace": 3,
        }
    ]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rule: rule.update(patient=3), "rule 'high': unknown field 'patient'"),
        (lambda rule: rule["when"].update(fire_over=3), "rule 'high': unknown field 'fire_over'"),
        (lambda rule: rule.pop("kind"), "rule 'high': Rule lacks the field 'kind'"),
        (lambda rule: rule.update(when={"any_of": 3}), "rule 'high': any_of: expected a list"),
        (lambda rule: rule.update(when=[]), "rule 'high': expected an object with the fields of Threshold"),
        (lambda rule: rule.update(patience="two"), "rule 'high': patience='two'"),
        (lambda rule: rule.pop("name"), "rule 'number 0': Rule lacks the field 'name'"),
    ],
)
def test_a_bad_rules_file_is_an_error_that_names_the_rule(tmp_path, change, complaint):
    path = tmp_path / "rules.json"
    save_rules([plain_rule()], path)
    rules = json.loads(path.read_text())
    change(rules[0])
    path.write_text(json.dumps(rules))
    with pytest.raises(ValueError, match=complaint):
        load_rules(path)


def test_a_file_that_is_not_a_list_of_rules_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("{}")
    for name, complaint in (("a.json", "not JSON"), ("b.json", "expected a list of rules")):
        with pytest.raises(ValueError, match=complaint):
            load_rules(tmp_path / name)


@pytest.mark.parametrize(
    ("quantile", "subject"),
    [
        (None, "key_rms"),
        (0.0, "the least key_rms"),
        (0.5, "the median key_rms"),
        (0.9, "the 90% quantile of key_rms"),
        (1.0, "the largest key_rms"),
    ],
)
def test_quantile_is_named_in_words(quantile, subject):
    assert subject_of(Threshold("key_rms", fire_above=1.0, clear_below=1.0, quantile=quantile)) == subject
