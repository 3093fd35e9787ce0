"""Run one episode of a BFCL task.

The policy and the ground truth have simulators of their own. They are compared at the end of each
user turn.
"""

import dataclasses
import json
from collections.abc import Sequence

from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.envs.bfcl import docs, protocols, scoring
from jaxgrpo.envs.bfcl.execution import Call, CallResult, Session
from jaxgrpo.envs.bfcl.protocols import Protocol
from jaxgrpo.envs.bfcl.scoring import TurnVerdict
from jaxgrpo.envs.bfcl.tasks import BfclTask, BfclTurn, Library
from jaxgrpo.toolkit.calls import Action, ToolRequest, run_in_order
from jaxgrpo.types import Score, StopReason, ToolCall


@dataclasses.dataclass(frozen=True)
class EpisodeOptions:
    """The settings of `Bfcl` that an episode needs."""

    protocol: Protocol
    docs: str
    examples: int
    max_turns: int
    max_steps_per_turn: int
    run_last_step: bool
    reward: str
    stop_at_lost_turn: bool
    result_limit: int


class BfclEnvironment:
    """The `Environment` of one episode.

    The policy ends each user turn by finishing or giving up. The end of the last turn ends the
    episode.
    """

    def __init__(self, library: Library, task: BfclTask, options: EpisodeOptions) -> None:
        self._library = library
        self._task = task
        self._options = options
        self._turns = task.turns[: options.max_turns]
        self._policy: Session = library.session(task)
        self._truth: Session = library.session(task)
        self._offered = set(task.tools) | set(self._turns[0].new_tools)
        self._turn = 0
        self._policy_turns = 0  # in this user turn
        self._results: list[CallResult] = []  # of the whole episode
        self._verdicts: list[TurnVerdict] = []
        self._turns_matched = 0  # user turns in which all ground-truth calls were made
        self._over = False
        self._start_turn()

    def _start_turn(self) -> None:
        self._policy_turns = 0
        self._call_steps = 0  # policy turns with calls; the official check calls them steps
        self._calls_made = 0

    def observe(self) -> Observation:
        documents = [self._library.document(self._task, name) for name in self._task.tools]
        query = turn_text(self._library, self._task, self._turns[0], self._options.docs)
        return self._options.protocol.open(
            documents, self._options.docs, self._options.examples, query
        )

    def step(self, action: str) -> StepResult:
        if self._over:
            raise RuntimeError(
                f"the episode of task {self._task.id!r} is over: create a new environment"
            )
        self._policy_turns += 1
        parsed = self._options.protocol.parse(action)
        if parsed.finished or parsed.gave_up:
            return self._end_turn(parsed)
        if parsed.fault:
            return self._answer(self._options.protocol.fault(parsed.fault), ())
        if self._is_last_step and not self._options.run_last_step:
            self._over = True
            return StepResult(stop_reason=StopReason.STEP_LIMIT)
        calls = self._run(parsed.requests)
        return self._answer(
            self._options.protocol.results(calls, len(parsed.requests) - len(calls)), calls
        )

    def _answer(self, observation: Observation, calls: tuple[ToolCall, ...]) -> StepResult:
        """Return the observation, or end the episode if the user turn has no step left."""
        if self._is_last_step:
            self._over = True
            return StepResult(stop_reason=StopReason.STEP_LIMIT, calls=calls)
        return StepResult(observation=observation, calls=calls)

    @property
    def _is_last_step(self) -> bool:
        return self._policy_turns >= self._options.max_steps_per_turn

    def _run(self, requests: Sequence[ToolRequest]) -> tuple[ToolCall, ...]:
        """Run the calls up to the first that fails. Calls before it keep their effect."""
        made_before = self._calls_made
        shown = run_in_order(requests, self._run_one)
        self._call_steps += self._calls_made > made_before
        return shown

    def _run_one(self, request: ToolRequest) -> ToolCall:
        arguments = json.dumps(dict(request.arguments), ensure_ascii=False)
        if request.fault:
            return ToolCall(request.name[:100], arguments, request.fault, ok=False)
        self._calls_made += 1
        call = Call(request.name, request.arguments)
        if request.name in self._offered:
            result = self._policy.run(call)
        else:
            result = CallResult(
                call,
                f"Error during execution: there is no tool named '{request.name[:100]}'",
                ok=False,
            )
        self._results.append(result)
        return ToolCall(request.name[:100], arguments, self._shown(result.text), result.ok)

    def _shown(self, text: str) -> str:
        """Shorten a result for the policy. The check uses the whole text."""
        limit = self._options.result_limit
        if not limit or len(text) <= limit:
            return text
        return f"{text[:limit]}... ({len(text) - limit} characters left out)"

    def _end_turn(self, parsed: Action) -> StepResult:
        self._judge_turn()
        self._start_turn()
        verdict = self._verdicts[-1]
        last = self._turn == len(self._turns)
        lost = (
            self._options.stop_at_lost_turn
            and self._options.reward == "official"
            and not verdict.passed
        )
        if last or lost:
            self._over = True
            ended = StopReason.FINISHED if last else StopReason.FAILED
            return StepResult(stop_reason=StopReason.GAVE_UP if parsed.gave_up else ended)
        turn = self._turns[self._turn]
        self._offered.update(turn.new_tools)
        return StepResult(
            observation=self._options.protocol.query(
                turn_text(self._library, self._task, turn, self._options.docs)
            )
        )

    def _judge_turn(self) -> None:
        truth = self._turns[self._turn].truth
        expected = [self._truth.run(call).text for call in truth]
        so_far = [result.text for result in self._results]
        played = scoring.PlayedTurn(so_far, self._calls_made, self._call_steps)
        self._verdicts.append(
            scoring.judge_turn(self._turn, self._policy, self._truth, expected, played)
        )
        made = self._results[len(self._results) - self._calls_made :]
        self._turns_matched += not scoring.missing_calls(truth, made)
        self._turn += 1

    def score(self) -> Score:
        """Score the episode so far.

        A turn that a limit cut off is checked like a finished one. Later turns count as turns
        without a call.
        """
        finished = self._turn == len(self._turns)
        while self._turn < len(self._turns):
            self._judge_turn()
            self._start_turn()
        self._over = True
        state_match = scoring.state_match(self._policy.instances, self._truth.instances)
        calls_match = self._turns_matched / len(self._turns)
        matches = {"state_match": state_match, "calls_match": calls_match}
        score = self._verdict(finished)
        return dataclasses.replace(score, parts={**score.parts, **matches})

    def _verdict(self, finished: bool) -> Score:
        if self._options.reward == "official":
            return scoring.official_score(self._verdicts, len(self._turns), finished)
        differences = scoring.state_differences(self._policy.instances, self._truth.instances)
        expected = [call for turn in self._turns for call in turn.truth]
        return scoring.call_match_score(
            self._verdicts, len(self._turns), finished, differences, self._results, expected
        )


def turn_text(library: Library, task: BfclTask, turn: BfclTurn, detail: str) -> str:
    """Return the user's message of a turn, with the documents of tools that become available.

    They are in the message because the chat template shows its list of tools only once.
    """
    if turn.new_tools:
        documents = docs.describe([library.document(task, name) for name in turn.new_tools], detail)
        announced = protocols.NEW_TOOLS.format(documents=documents)
        return f"{turn.query}\n\n{announced}" if turn.query else announced
    return turn.query or protocols.CONTINUE
