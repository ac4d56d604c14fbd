"""Settings: the specification's block loads as it stands, fractions stay exact, and mistakes end in one sentence."""

from __future__ import annotations

from fractions import Fraction

import pytest
import yaml

from emrakul.invalid import Invalid
from emrakul.settings import Settings
from leyline.messages import Stage

SPECIFICATION = {
    "emrakul": {
        "enable_checkpoint_pruning": False,
        "checkpoint_analysis_timeout": 300,
        "analysis_parallel_workers": 4,
        "worker_scaling_formula": "ceil(num_params / (500000 * 300))",
        "worker_calculation_rate": 500000,
        "worker_time_budget": 300,
        "structured_pruning": {
            "enabled": True,
            "progressive_schedule": {
                "phase_1_epochs": 30,
                "phase_2_start_epoch": 31,
                "conservative_threshold": 0.01,
                "moderate_threshold": 0.03,
                "aggressive_threshold": 0.05,
            },
            "safety_constraints": {
                "min_channel_retention": 0.8,
                "min_attention_heads": 2,
                "max_layer_removal": 0.25,
                "accuracy_drop_threshold": 0.02,
            },
        },
        "conservative_threshold": 0.01,
        "safety_margin": 0.5,
        "min_importance_samples": 1000,
        "accuracy_targets": {
            "importance_ranking": {"metric": "kendall_tau", "target": 0.85},
            "pruning_precision": {"metric": "MAPE_vs_Fisher", "target": 0.05},
            "binary_classification": {"metric": "AUC", "target": 0.95},
        },
        "enable_safety_validation": True,
        "validation_timeout": "60s",
        "importance_aggregation_threads": 2,
        "analysis_memory_limit": "2GB",
        "current_implementation": "logical_pruning",
        "expected_benefits": "validation_only",
        "physical_compaction_planned": "phase_2",
    }
}


def test_the_specifications_block_loads_and_is_the_default() -> None:
    loaded = Settings.from_yaml(yaml.safe_dump(SPECIFICATION))
    assert loaded == Settings()
    assert loaded == Settings.from_yaml(yaml.safe_dump(SPECIFICATION["emrakul"]))
    assert loaded.analysis_memory_limit == 2_000_000_000
    assert loaded.validation_timeout == 60


def test_one_percent_is_exactly_a_hundredth() -> None:
    settings = Settings.from_yaml("structured_pruning: {progressive_schedule: {moderate_threshold: 0.030}}")
    assert settings.rate(Stage.CONSERVATIVE) == settings.rate(Stage.VALIDATION_ONLY) == Fraction(1, 100)
    assert settings.rate(Stage.MODERATE) == Fraction(3, 100)
    assert settings.rate(Stage.AGGRESSIVE) == Fraction(5, 100)
    assert settings == Settings(), "0.030 is 0.03"


def test_a_stored_form_reads_back_and_has_one_digest() -> None:
    settings = Settings(importance=("wanda",))
    again = Settings.parse(settings.canonical(), name="settings")
    assert again == settings == Settings.model_validate(settings.frozen())
    assert again.sha256() == settings.sha256() != Settings().sha256()


def test_what_only_changes_speed_stays_outside_the_result_digest() -> None:
    slow = Settings(analysis_parallel_workers=7, checkpoint_analysis_timeout=900, analysis_memory_limit=4_000_000_000)
    assert slow.digest() == Settings().digest()
    assert slow.sha256() != Settings().sha256()
    assert Settings(safety_margin=Fraction(4, 10)).digest() != Settings().digest()


def test_a_resource_has_camel_case_keys_and_fractions_as_text() -> None:
    content = {"safetyMargin": "0.25", "structuredPruning": {"safetyConstraints": {"maxLayerRemoval": "0.5"}}}
    settings = Settings.from_resource(content, name="spec.settings")
    assert settings.safety_margin == Fraction(1, 4)
    assert settings.constraints.max_layer_removal == Fraction(1, 2)
    assert settings == Settings.from_yaml(
        "{safety_margin: 0.25, structured_pruning: {safety_constraints: {max_layer_removal: 0.5}}}"
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"safety_margin": "0.5"}, "did you mean safetyMargin (keys are camelCase in a resource)?"),
        ({"safetyMargin": 0.5}, "spec.settings.safetyMargin is the number 0.5; fractions in a resource are text"),
        ({"structuredPruning": {"safetyConstraints": {"maxLayersRemoval": "0.1"}}}, "did you mean maxLayerRemoval?"),
    ],
)
def test_a_resource_is_refused_with_a_remedy(content: dict[str, object], says: str) -> None:
    with pytest.raises(Invalid, match=r"^spec\.settings") as refusal:
        Settings.from_resource(content, name="spec.settings")
    assert says in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("safty_margin: 0.5", "safty_margin is no known key; did you mean safety_margin?"),
        ("safetyMargin: 0.5", "did you mean safety_margin (keys are snake_case in files)?"),
        ("structured_pruning: {safety_constraints: {min_heads: 2}}", "min_heads is no known key; did you mean"),
        ("zzz: 1", "known here: accuracy_targets, "),
        ("safety_margin: 1.5", "safety_margin is 1.5; a fraction lies between 0 and 1"),
        ("safety_margin: -0.5", "a fraction lies between 0 and 1"),
        ("safety_margin: 50%", "a fraction lies between 0 and 1"),
        ("safety_margin: true", "a fraction lies between 0 and 1"),
        ("safety_margin: .nan", "a fraction lies between 0 and 1"),
        ("safety_margin: 1.0", "no unit could ever go"),
        ("enable_checkpoint_pruning: 1", "enable_checkpoint_pruning is 1, it should be a valid boolean"),
        ("analysis_parallel_workers: 0", "analysis_parallel_workers is 0, it should be greater than or equal to 1"),
        ("analysis_parallel_workers: '4'", "should be a valid integer"),
        ("validation_timeout: 60x", "write seconds as 300 or 60s"),
        ("validation_timeout: 0", "write seconds as 300 or 60s"),
        ("analysis_memory_limit: 2 cats", "write a size of at least 96MB such as 2GB"),
        ("analysis_memory_limit: 1", "write a size of at least 96MB"),
        ("consensus: {replicas: 2}", "consensus.replicas is 2, it should be 1 or 3"),
        ("importance: [taylor, tailor]", "importance.1 is 'tailor', it should be 'taylor'"),
        ("importance: [taylor, taylor]", "importance names a scorer twice"),
        ("structured_pruning: {progressive_schedule: {phase_1_epochs: 3}}", "so write 4 or change both"),
        ("structured_pruning: {progressive_schedule: {moderate_threshold: 0.5}}", "at least the one before it"),
        ("structured_pruning: {safety_constraints: {accuracy_drop_threshold: 0.05}}", "of a single cycle; raise it"),
        ("worker_calculation_rate: 1000000", "divides by 500000, but worker_calculation_rate is 1000000"),
        ("worker_scaling_formula: open(num_params)", "contains 'open(num_params)'"),
        ("a: 1\na: 2", "line 2: key 'a' occurs twice"),
        ("a: &x 1", "YAML anchor"),
        ("a: [", "is not readable YAML: line 1"),
        ("- a", "settings are a mapping"),
        ("emrakul: {}\n---\nemrakul: {}", "has 2 YAML documents"),
        ("!!python/object/apply:os.system [ls]", "is not readable YAML"),
    ],
)
def test_a_mistake_ends_in_one_sentence_that_names_it(text: str, says: str) -> None:
    with pytest.raises(Invalid, match=r"^conf\.yaml") as refusal:
        Settings.from_yaml(text, name="conf.yaml")
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_sizes_and_durations_as_people_write_them() -> None:
    settings = Settings.from_yaml("{analysis_memory_limit: 1.5Gi, validation_timeout: 2m, startup_timeout: 900}")
    assert settings.analysis_memory_limit == 3 * 2**29
    assert settings.validation_timeout == 120
    assert settings.startup_timeout == 900


def test_an_empty_file_means_the_defaults_and_one_scorer_may_be_named() -> None:
    assert Settings.from_yaml("") == Settings.from_yaml("emrakul:") == Settings()
    chosen = Settings.from_yaml("importance: magnitude")
    assert chosen.scorers[0] == "magnitude"
    assert set(chosen.scorers) == set(Settings().scorers)


def test_kinds_that_may_go_are_one_choice_in_whatever_order() -> None:
    chosen = Settings.from_yaml("structured_pruning: {kinds: [head, channel]}")
    assert chosen == Settings.from_yaml("structured_pruning: {kinds: [channel, head]}")
    assert chosen.structured_pruning.kinds == ("channel", "head")
    assert chosen.digest() != Settings().digest()


@pytest.mark.parametrize(
    ("kinds", "says"),
    [("[head, head]", "names a kind twice"), ("[]", "structured_pruning.kinds"), ("[weight]", "'channel'")],
)
def test_kinds_that_cannot_be_chosen(kinds: str, says: str) -> None:
    with pytest.raises(Invalid) as refusal:
        Settings.from_yaml(f"structured_pruning: {{kinds: {kinds}}}")
    assert says in str(refusal.value)
