"""Broken environments, and what a check says about each."""

from tests.check_environments import with_environment

BROKEN = {
    "raises in create": (
        with_environment("def __init__(self, numbers):\n    raise OSError('no disk')"),
        "error",
        "OSError: no disk (mine.py, line {raise OSError}, in __init__)",
        "mend create()",
    ),
    "raises in observe": (
        with_environment("def observe(self):\n    raise KeyError('no such seat')"),
        "error",
        "KeyError: 'no such seat' (mine.py, line {raise KeyError}, in observe)",
        "groups of the task are dropped",
    ),
    "raises in step": (
        with_environment("def step(self, action):\n    self.n = int(action)"),
        "error",
        "ValueError: invalid literal for int() with base 10: '",
        "answer a mistake of the policy with an observation",
    ),
    "raises in score": (
        with_environment(
            "def score(self):\n    return Score([n for n in self.said if n.isdecimal()][0], True)"
        ),
        "error",
        "IndexError: list index out of range (mine.py, line {isdecimal()][0]}, in score)",
        "because a limit may end the episode",
    ),
    "opens by chance": (
        with_environment("def observe(self):\n    return ask(f'Seed {random.random()}')"),
        "error",
        " (mine.py, line {def observe(self)})",
        "random.Random(task.id)",
    ),
    "returns the wrong type": (
        with_environment("def step(self, action):\n    return 'fine'"),
        "error",
        "returned str, not StepResult (mine.py, line {def step(self, action)})",
        "",
    ),
    "speaks in an unknown role": (
        with_environment(
            "def step(self, action):\n    return StepResult(Observation((Message('usr', 'x'),)))"
        ),
        "error",
        "a message's role must be one of system, user, assistant, tool, got 'usr'; did you mean "
        "'user'?",
        "",
    ),
    "speaks as the policy": (
        with_environment(
            "def step(self, action):\n    return StepResult(Observation((Message('assistant', "
            "'x'),)))"
        ),
        "error",
        "spoke as assistant: that is the policy's role",
        "",
    ),
    "gives two tools one name": (
        with_environment("def observe(self):\n    return ask('Add', tools=(tool(), tool()))"),
        "error",
        "an observation's tools have the name 'add' twice",
        "",
    ),
    "gives tools later": (
        with_environment(
            "def step(self, action):\n    return StepResult(ask('Add', tools=(tool(),)))"
        ),
        "error",
        "gave tools: only the first observation has them",
        "",
    ),
    "has an invalid schema": (
        with_environment(
            "def observe(self):\n"
            "    return ask('Add', tools=(tool(parameters={'type': 'object', 'properties': {'a': "
            "{'type': 'str'}}}),))"
        ),
        "error",
        "tool 'add': parameters.properties.a: type must be one of array, boolean, integer, null, "
        "number, object, string, got 'str'",
        "JSON Schema",
    ),
    "lists properties": (
        with_environment(
            "def observe(self):\n"
            "    parameters = {'properties': ['a'], 'minItems': 'x'}\n"
            "    return ask('Add', tools=(tool(parameters=parameters),))"
        ),
        "error",
        "tool 'add': parameters: properties must be a dict of schemas, got ['a']",
        "JSON Schema",
    ),
    "describes a tool with nothing": (
        with_environment(
            "def observe(self):\n    return ask('Add', tools=(tool(description=''),))"
        ),
        "warning",
        "tool 'add' has no description",
        "",
    ),
    "has long prompts": (
        with_environment("def observe(self):\n    return ask('word ' * 100)"),
        "error",
        "6 of 6 prompts of train exceed rollout.max_prompt_tokens (256): the longest has ",
        "set rollout.max_prompt_tokens to ",
    ),
    "scores NaN": (
        with_environment("def score(self):\n    return Score(float('nan'), False)"),
        "error",
        "ValueError: a score's reward must be a finite number",
        "",
    ),
    "hangs": (
        with_environment("def step(self, action):\n    time.sleep(30)"),
        "error",
        "took longer than the deadline of 0.3 seconds: it waits at mine.py, line {time.sleep}, "
        "in step",
        "raise rollout.step_deadline_seconds",
    ),
    "hangs at the end": (
        with_environment(
            "def step(self, action):\n"
            "    if self.said and self.said[-1].isdecimal():\n        time.sleep(30)\n"
            "    return super().step(action)"
        ),
        "error",
        "step() after the end of task 'train_0' took longer than the deadline",
        "",
    ),
    "is slow": (
        with_environment(
            "def score(self):\n    time.sleep(0.6 if self.said == ['1'] else 0)\n    return "
            "super().score()"
        ),
        "warning",
        " s of a deadline of 1 s",
        "raise rollout.step_deadline_seconds",
    ),
    "never ends": (
        with_environment(
            "def step(self, action):\n    self.said.append(action)\n    return "
            "StepResult(ask('Go on.'))"
        ),
        "warning",
        "was ended by the environment: all ran into rollout.max_turns (4)",
        "return StepResult(stop_reason=...)",
    ),
    "scores nothing": (
        with_environment("def score(self):\n    return Score(0.0, False)"),
        "warning",
        "every scripted episode gets reward 0, 16 of 16: nothing is learned from equal rewards",
        "a solution and a mistake must not earn the same",
    ),
    "does not pass its demonstration": (
        with_environment("pass", "def demonstration(self, task):\n    return ('<say>1000</say>',)"),
        "error",
        "the demonstration does not pass: reward 0, finished",
        "compare the turns of demonstration() with what score() wants",
    ),
    "demonstrates without an end": (
        with_environment("pass", "def demonstration(self, task):\n    return ('<say>well</say>',)"),
        "error",
        "the demonstration does not pass",
        "it waited for more",
    ),
    "demonstrates two turns in one": (
        with_environment(
            "pass",
            "def demonstration(self, task):\n    return ('<say>hm</say> <say>1</say>',)",
        ),
        "error",
        "the demonstration does not pass",
        "a stop string cut the turn '<say>hm</say> <say>1</say>', and ' <say>1</say>' was lost",
    ),
    "demonstrates at length": (
        with_environment(
            "pass",
            "def demonstration(self, task):\n    return ('<say>' + 'x' * 600 + '</say>',)",
        ),
        "warning",
        "the demonstration does not fit rollout.max_completion_tokens (512)",
        "raise rollout.max_completion_tokens",
    ),
    "passes, but beyond the limit": (
        with_environment(
            "def score(self):\n    return Score(1.0 + len(self.said), True)",
            "def demonstration(self, task):\n    return ('<say>' + 'x' * 600 + '</say>',)",
        ),
        "warning",
        "the demonstration does not fit rollout.max_completion_tokens (512)",
        "raise rollout.max_completion_tokens",
    ),
    "demonstrates in too many turns": (
        with_environment(
            "def step(self, action):\n    self.said.append(action)\n    return "
            "StepResult(ask('More'))",
            "def demonstration(self, task):\n    return ('<say>1</say>',) * 5",
        ),
        "warning",
        "the demonstration does not fit rollout.max_turns (4): 5 turn(s) in all",
        "raise rollout.max_turns",
    ),
    "raises in demonstration": (
        with_environment("pass", "def demonstration(self, task):\n    return task.payload.turns"),
        "error",
        "AttributeError: 'tuple' object has no attribute 'turns' (mine.py, line {payload.turns}, "
        "in demonstration)",
        "a tuple of str",
    ),
    "hangs in demonstration": (
        with_environment("pass", "def demonstration(self, task):\n    time.sleep(30)"),
        "error",
        "demonstration() of task 'train_0' took longer than the deadline of 0.3 seconds: it waits",
        "raise rollout.step_deadline_seconds",
    ),
    "demonstrates one text": (
        with_environment("pass", "def demonstration(self, task):\n    return '<say>3</say>'"),
        "error",
        "returned str, not the texts of turns, a tuple of str",
        "",
    ),
    "rewards mistakes more": (
        with_environment(
            "def score(self):\n    return Score(float(len(self.said)), self.said[-1].isdecimal())"
        ),
        "warning",
        "a mistake earns more than the demonstration: 3 against 1",
        "let the reward of a solved task be the highest",
    ),
    "passes whatever is done": (
        with_environment(
            "def score(self):\n    return Score(1.0 + 0.1 * sum(map(str.isdecimal, self.said)), "
            "True)"
        ),
        "warning",
        "the script 'immediate end' passes 4 of 4 tasks",
        "a policy would learn to do just this",
    ),
    "has rewards that nothing normalizes": (
        with_environment(
            "def score(self):\n    return Score(50.0 * super().score().reward, "
            "super().score().passed)"
        ),
        "warning",
        "rewards are as large as 50, and nothing normalizes them",
        "batching.advantage_normalization",
    ),
    "shares state among episodes": (
        with_environment(
            "seen = {}\n\ndef score(self):\n    self.seen[self.numbers] = "
            "self.seen.get(self.numbers, 0) + 1\n"
            "    return Score(1.0 / self.seen[self.numbers], super().score().passed)"
        ),
        "warning",
        "two episodes with the same turns at the same time get different rewards ",
        "keep all state in the environment that create() returns",
    ),
    "answers by chance": (
        with_environment(
            "def step(self, action):\n    self.said.append(action)\n"
            "    return StepResult(ask(str(random.random()))) if len(self.said) < 3 else "
            "StepResult(stop_reason=StopReason.FINISHED)\n\n"
            "def score(self):\n    return Score(float(len(self.said[0])), True)"
        ),
        "warning",
        "two episodes with the same turns at the same time get different answers ",
        "if chance is wanted here, go on",
    ),
    "lists tasks in any order": (
        with_environment(
            "pass", "def tasks(self, split):\n    return random.sample(super().tasks(split), 6)"
        ),
        "error",
        "tasks('train') gives other tasks, or another order, the second time",
        "in a fixed order",
    ),
    "tests on training tasks": (
        with_environment("pass", "def tasks(self, split):\n    return super().tasks('train')"),
        "warning",
        "6 of 6 tasks of test are also in train: 'train_0'",
        "held out",
    ),
    "raises in tasks": (
        with_environment("pass", "def tasks(self, split):\n    return open('/no/such/list')"),
        "error",
        "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/list' (mine.py, line "
        "{/no/such/list}, in tasks)",
        "provide what tasks() needs, such as a file or a running server, or mend tasks()",
    ),
    "forgets the stop strings": (
        with_environment(
            "def step(self, action):\n    super().step(action)\n    return StepResult(ask('x', "
            "stop_strings=()))"
        ),
        "warning",
        "the opening has stop strings ('</say>',), an observation of step() has none",
        "give every observation the same stop strings",
    ),
    "goes on after the end": (
        with_environment(
            "def step(self, action):\n    if self.said and self.said[-1].isdecimal():\n        "
            "return StepResult(ask('Still here'))\n"
            "    return super().step(action)"
        ),
        "warning",
        "step() after the end goes on with the episode",
        "raise an exception there",
    ),
    "raises in close": (
        with_environment("def close(self):\n    raise OSError('still busy')"),
        "error",
        "OSError: still busy (mine.py, line {still busy}, in close)",
        "let close() work after any call",
    ),
    "calls without JSON": (
        with_environment(
            "def step(self, action):\n    call = ToolCall('say', \"{'a': 1}\", '', True)\n"
            "    return StepResult(stop_reason=StopReason.FINISHED, calls=(call,))"
        ),
        "warning",
        "the arguments of a ToolCall are not JSON: \"{'a': 1}\"",
        "json.dumps",
    ),
    "cannot be recorded": (
        with_environment("pass", "read: object = lambda path: path"),
        "warning",
        "a run's config.json cannot hold the environment: ",
        "make what else it needs in create()",
    ),
    "steps asynchronously": (
        with_environment("async def step(self, action):\n    return StepResult(ask('x'))"),
        "error",
        "returned Broken, whose step is async: write it without",
        "",
    ),
    "creates asynchronously": (
        with_environment("pass", "async def create(self, task):\n    return Broken(task.payload)"),
        "error",
        "returned coroutine, which has no method observe(): write it without async",
        "",
    ),
    "observes by a coroutine": (
        with_environment(
            "def observe(self):\n    async def later():\n        return ask('x')\n    return "
            "later()"
        ),
        "error",
        "returned coroutine, not Observation: write it without async",
        "",
    ),
    "lists tasks asynchronously": (
        with_environment("pass", "async def tasks(self, split):\n    return []"),
        "error",
        "got <coroutine object Suite.tasks",
        "",
    ),
    "is rewarded by a broken function": (
        with_environment("pass").replace(
            "config(Suite())", "config(Suite(), rewards=RewardSettings((brevity,)))"
        )
        + "\n\ndef brevity(trajectory, score):\n    return -1 / len(trajectory.calls)\n",
        "error",
        "ZeroDivisionError: division by zero (mine.py, line {-1 / len}, in brevity)",
        "also one without a tool call",
    ),
}  # fmt: skip
"""For each broken environment: its file, the level, what is told, and the advice."""

SETTINGS = {
    "hangs": ("rollout.step_deadline_seconds=0.3",),
    "hangs in demonstration": ("rollout.step_deadline_seconds=0.3",),
    "hangs at the end": ("rollout.step_deadline_seconds=0.3",),
    "is slow": ("rollout.step_deadline_seconds=1",),
    "has rewards that nothing normalizes": ("batching.advantage_normalization=none",),
}
"""Settings with which an environment is checked, other than those of the file."""
