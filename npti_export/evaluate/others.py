"""Other methods on the same questions as the artifact: at its damage, as far as they get there.

They run where the model computes fastest, which may be in another type than the artifact's: a bfloat16 copy of a
quantised file, say. So that a gain is that of the method and not of the type, it is over that very model's own answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from npti_export.errors import ProfileError
from npti_export.evaluate import baselines
from npti_export.evaluate.capability.neutral import NeutralText
from npti_export.evaluate.capability.tasks import neutral_passages
from npti_export.evaluate.conditions import Kind, Test, Told, Way, ask
from npti_export.evaluate.distribution import distribution, trait_neurons
from npti_export.evaluate.document import Distribution
from npti_export.evaluate.engine import Engine
from npti_export.evaluate.subject import Subject, unsteered
from npti_export.identify.profiles import identified
from npti_export.profile import NeuronProfile
from npti_export.progress import Progress
from npti_export.recipe import load_recipe
from npti_export.rule import SteeringRule

if TYPE_CHECKING:
    from npti_export.runtimes.transformers import TransformersRuntime

PASSAGES = 16  # neutral ones at which methods are brought to the artifact's damage
QUESTIONS = 96  # that neurons are identified on for the other methods, if nobody did so before
DRAWS = 8  # of random neurons or directions, a share of the questions each: one draw says little of chance
KEPT_BYTES = 4 << 30  # of what the base predicts, where it cannot be asked again while it is steered
_UNTUNED = "unsteered-fine-tuned"  # the model that is fine-tuned, before
_PLAIN = "unsteered-methods"  # that other methods steer, where it is not the artifact's own


@dataclass
class Others:
    """What the artifact is compared with, apart from prompts.

    Attributes:
        subject: the artifact.
        test: what is asked.
        names: of :data:`npti_export.evaluate.run.KNOWN_BASELINES`.
        damage: KL of the artifact on the first :data:`PASSAGES` neutral passages, in nats a token.
        seed: of chance.
        progress: told of each, and of what is left out.
        strengths: by name, filled in by :meth:`told`: strength, damage, wanted damage, neurons.
        distribution: activations of the trait's neurons, likewise.
    """

    subject: Subject
    test: Test
    names: Sequence[str]
    damage: float
    seed: int
    progress: Progress
    strengths: dict[str, dict[str, float]] = field(default_factory=dict)
    distribution: Distribution | None = None

    def told(self) -> list[Told]:
        """Answers of all of them; fine-tuning has no strength, and comes as it is."""
        found = self._ruled([name for name in self.names if name != baselines.LORA])
        return found + (self._fine_tuned() if baselines.LORA in self.names else [])

    def _ruled(self, names: Sequence[str]) -> list[Told]:
        engine, saved = self.subject.engine, self.subject.saved
        if not names:
            return []
        if engine is None:
            self.progress.note(f"{self.subject.source.name}: no rule can be baked into it, so there are no baselines")
            return []
        neutral = NeutralText(engine.base, neutral_passages()[:PASSAGES], kept_bytes=KEPT_BYTES)
        neutral.keep()
        rules = self._rules([name for name in names if name in baselines.METHODS])
        chance = baselines.NULL in names and saved is not None
        if baselines.NULL in names and saved is None:
            self.progress.note(f"{self.subject.artifact.name}: holds no rule, so random neurons have nothing to match")
        self.progress.start("baselines", len(rules) + chance)
        found = self._plain(engine) if rules or chance else []
        for name, rule in rules.items():
            found.append(self._method(name, rule, engine, neutral))
            self.progress.advance(1)
        if chance and saved is not None:
            found.append(self._chance(saved.rule, engine, neutral))
            self.progress.advance(1)
        return found

    def _plain(self, engine: Engine) -> list[Told]:
        """The model that they steer, unsteered, where it is another one than the artifact's."""
        if engine.base is self.subject.base:
            return []
        label = f"Unsteered, as other methods steer it ({self.subject.models.dtype()})"
        return [ask(Way(_PLAIN, label, "base", lambda: unsteered(engine.base)), engine.base, self.test)]

    def _way(self, name: str, label: str, kind: Kind, engine: Engine, rule: SteeringRule) -> Way:
        against = "unsteered" if engine.base is self.subject.base else _PLAIN
        return Way(name, label, kind, lambda: engine.steered(rule), against=against)

    def _rules(self, names: Sequence[str]) -> dict[str, SteeringRule]:
        """The rules of methods, at their own strengths; one that selects no neuron of this model is left out."""
        rules: dict[str, SteeringRule] = {}
        profile = self._profile() if names else None
        for name in names:
            assert profile is not None
            try:
                rules[name] = baselines.method_rule(name, profile, self.subject.spec)
            except ProfileError as error:
                self.strengths[name] = {"neurons": 0}
                self.progress.note(f"baseline {name} is left out: {error}")
        return rules

    def _levelled(self, name: str, rule: SteeringRule, engine: Engine, neutral: NeutralText) -> baselines.Levelled:
        wanted = max(self.damage, 1e-6)
        found = baselines.level(engine, lambda at: baselines.scaled(rule, at), neutral, wanted)
        neurons = rule.clamp | (rule.shift != 0) | (False if rule.constant is None else rule.constant != 0)
        self.strengths[name] = {
            "strength": round(found.strength, 4),
            "damage": round(found.damage, 5),
            "wanted": round(wanted, 5),
            "neurons": int(neurons.sum()),
        }
        return found

    def _method(self, name: str, rule: SteeringRule, engine: Engine, neutral: NeutralText) -> Told:
        level = self._levelled(name, rule, engine, neutral)
        label = self._label(name, baselines.METHODS[name], level.damage)
        way = self._way(name, label, "baseline", engine, level.rule)
        with way.open() as runtime:
            return replace(ask(way, runtime, self.test), damage=level.damage)

    def _label(self, name: str, label: str, damage: float) -> str:
        """A method's name, and that it is not at the artifact's damage where no strength brought it there."""
        missed = baselines.off_level(damage, self.damage)
        if not missed:
            return label
        self.progress.note(f"baseline {name}: no strength that was tried does the artifact's damage; it is {missed}")
        return f"{label}, {missed}"

    def _chance(self, rule: SteeringRule, engine: Engine, neutral: NeutralText) -> Told:
        """The null trait: the same numbers at random neurons, drawn anew for every few questions.

        An interval over questions alone would take one draw for chance itself: a random direction moves the contrast
        of all answers a little, one way or the other. All draws have the strength of the first.
        """
        name, questions = baselines.NULL, self.test.questions
        draws = min(DRAWS, len(questions))
        groups = [place * draws // len(questions) for place in range(len(questions))]
        first = self._levelled(name, baselines.null_rule(rule, self.seed), engine, neutral)
        self.strengths[name] |= {"draws": draws}
        what = "Random neurons" if rule.shifted or rule.clamped else "Random directions"
        label = self._label(name, f"{what}, {draws} draws", first.damage)
        found = []
        for draw in range(draws):
            drawn = baselines.scaled(baselines.null_rule(rule, self.seed + draw), first.strength)
            own = [one for one, group in zip(questions, groups, strict=True) if group == draw]
            way = self._way(name, label, "null", engine, drawn)
            with way.open() as runtime:
                found.append(ask(way, runtime, replace(self.test, questions=own)))
        tokens = [answer for one in found for answer in one.tokens]
        return Told(found[0].way, tokens, sum(one.seconds for one in found), first.damage, tuple(groups))

    def _fine_tuned(self) -> list[Told]:
        """The paper's fine-tuning row, behind the model that is tuned: the artifact's own may run elsewhere.

        It has no strength, so its damage is what it is, and is told beside it.
        """
        from npti_export.evaluate.finetune import FineTuneSettings, fine_tuned, plain_exchanges

        subject, test, models = self.subject, self.test, self.subject.models
        trains = models.engine == "transformers" and models.dtype() != "float16"  # which overflows
        runtime = cast("TransformersRuntime", models.fast()) if trains else models.exact()
        count = min(FineTuneSettings.questions, len(subject.bench.split("search")))
        settings = FineTuneSettings(questions=count, seed=self.seed)
        exchanges = plain_exchanges(
            runtime, subject.bench, test.sign, test.recipe, count, max_new_tokens=test.answer_tokens
        )
        neutral = NeutralText(runtime, neutral_passages()[:PASSAGES], kept_bytes=KEPT_BYTES)
        neutral.keep()
        before = []
        if runtime is not subject.base:
            way = Way(_UNTUNED, f"Unsteered, in {runtime.dtype} transformers", "base", lambda: unsteered(runtime))
            before.append(ask(way, runtime, test))
        way = Way(
            baselines.LORA,
            "Fine-tuned (LoRA), not at equal damage",
            "baseline",
            lambda: fine_tuned(runtime, exchanges, settings, self.progress),
            against=_UNTUNED if before else "unsteered",
        )
        with way.open() as tuned:
            told = ask(way, tuned, test)
            damage = float(neutral.kl(tuned).mean())
        self.strengths[way.name] = {"damage": round(damage, 5), "questions": count, "epochs": settings.epochs}
        return [*before, replace(told, damage=damage)]

    def _profile(self) -> NeuronProfile:
        """Neurons of the trait, for the other methods, and what they do under both poles."""
        subject = self.subject
        available = len(subject.bench.split("search"))
        recipe = load_recipe(
            "npti",
            [
                f"identify.questions={min(QUESTIONS, available)}",
                f"identify.max_new_tokens={self.test.answer_tokens}",
                f"identify.batch_size={subject.recipe.identify.batch_size}",
            ],
        )
        stats, profile = identified(subject.place, subject.bench, recipe, self.progress)
        sign = subject.spec.sign
        with suppress(ProfileError):  # none selected: a baseline says so
            neurons = trait_neurons(subject.saved, subject.spec.pole, profile, recipe)
            self.distribution = distribution(stats, neurons, sign)
        return profile
