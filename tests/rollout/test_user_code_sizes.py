"""What users' code says at length: it is looked at before anything is tokenised."""

import threading
import time
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers

from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.types import Message, StopReason, ToolCall
from tests.byte_chat import byte_tokenizer
from tests.one_episode import LIMITS, limits, play, stepping


class WatchedChat(Chat):
    """Knows in which threads it rendered what stands between turns."""

    def __init__(self):
        super().__init__(byte_tokenizer())
        self.threads = []

    def continuation(self, messages, ended_with_eos):
        self.threads.append(threading.current_thread())
        return super().continuation(messages, ended_with_eos)


class TestSizes:
    def answering(self, *messages, calls=()):
        def step(answer, action):
            return StepResult(Observation(messages), calls=calls)

        return stepping(step)

    @pytest.mark.parametrize(
        ("limits", "reason"),
        [(LIMITS, StopReason.TOKEN_LIMIT), (limits(4000, 10, 200, 400), StopReason.CONTEXT_LIMIT)],
    )
    def test_a_result_of_40_megabytes_ends_the_episode_at_once(
        self, limits: Any, reason: StopReason
    ) -> None:
        huge = "r" * 40_000_000
        calls, chat = (ToolCall("read", "{}", huge, ok=True),), WatchedChat()
        started = time.perf_counter()
        trajectory = play(
            self.answering(Message("tool", huge), calls=calls), limits=limits, chat=chat
        )
        assert chat.threads == [] and time.perf_counter() - started < 2
        assert trajectory.stop_reason is reason
        assert trajectory.completion_ids_C.tolist() == [*b"x", 259]
        assert (
            trajectory.calls[0].result.endswith("r... (40000000 characters)")
            and len(trajectory.calls[0].result) == 100_000
        )

    def test_a_million_messages_end_the_episode_without_being_rendered(self) -> None:
        messages = (Message("tool", ""),) * 1_000_000
        chat = WatchedChat()
        trajectory = play(self.answering(*messages), chat=chat)
        assert trajectory.stop_reason is StopReason.TOKEN_LIMIT
        assert chat.threads == [] and len(trajectory.messages) == 2

    def test_nothing_that_fits_is_taken_to_be_too_long(self) -> None:
        """The longest token, in characters that the tokenizer composes to those of the token."""
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        tokenizer.add_tokens(AddedToken("\u1f82" * 20, normalized=True))
        chat = Chat(tokenizer)
        messages = (Message("tool", "\u03b1\u0313\u0300\u0345" * 20 * 500),)
        tokens = len(chat.continuation(messages, ended_with_eos=True))
        assert 500 == chat.fewest_tokens(messages) <= tokens < 600

    def test_calls_of_an_episode_are_kept_within_bounds(self) -> None:
        calls = (ToolCall("read", "a" * 90_000, "r" * 90_000, ok=True),) * 100

        def step(answer, action):
            return (
                StepResult(answer(action).observation, calls=calls)
                if "done" not in action
                else answer(action)
            )

        trajectory = play(stepping(step))
        assert len(trajectory.calls) == 100
        assert sum(len(call.arguments) + len(call.result) for call in trajectory.calls) < 4_100_000
        assert [len(trajectory.calls[i].result) for i in (0, 21, 22, 99)] == [
            90_000,
            90_000,
            100,
            100,
        ]
        assert trajectory.calls[99].result.endswith("r... (90000 characters)")

    def test_a_long_text_is_tokenised_beside_the_event_loop(self) -> None:
        chat = WatchedChat()
        trajectory = play(
            self.answering(Message("tool", "word " * 10_000)),
            limits=limits(60_000, 2, 200, 70_000),
            chat=chat,
        )
        assert trajectory.turns == 2 and len(trajectory.completion_ids_C) > 50_000
        assert len(chat.threads) == 1 and chat.threads[0] is not threading.current_thread()
