"""Learning on one's own texts: the student goes on from prompts, and the teacher says what it thinks of that."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lfm.checkpoint import OutputFolder
from lfm.data import Rows
from lfm.distill._contract import Inputs, OnPolicy
from lfm.distill._matching import Pair, validation
from lfm.distill._students import load_student, open_teacher
from lfm.distill._texts import continued, still
from lfm.distill._training import finish, train
from lfm.errors import RequestError
from lfm.models.encode import IGNORE, Batch, Examples, Given
from lfm.models.handle import Model
from lfm.models.text import Sampling
from lfm.models.writing import ModuleStepper
from lfm.recipe.step import Context, StepResult
from lfm.train import Epochs


def learn_on_policy(method: OnPolicy, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Teach a student on what it writes itself, into `folder`."""
    if inputs.data is None:
        raise AssertionError("the plan lets nothing run without data")
    rows = context.rows(inputs.data)
    teacher = open_teacher(method, inputs, context)
    student = load_student(inputs, teacher, context)
    for model in (teacher, student):
        if model.task != "causal-lm" or model.encoder.tokenizer is None:
            raise RequestError(f"{model.label}: writes no text; teacher and student are causal-lms with a tokenizer")
    if teacher.encoder.tokenizer.get_vocab() != student.encoder.tokenizer.get_vocab():
        raise RequestError(f"{student.label}: has another tokenizer than the teacher; give it the same")
    pair = Pair(method, teacher, student)
    prompts = Prompts(rows, student, method.prompt_tokens, inputs.length)
    if not prompts.whole and method.author(math.nextafter(1.0, 0.0)) == "data":
        raise RequestError(f"{rows.origin}: has prompts without completions to learn from; set lmbda to 1, or seq_kd")
    source = Mixed(method, prompts, teacher, student, context.seed)
    per_epoch = math.ceil(len(prompts) / (method.batch_size * method.accumulate))
    log = train(
        student.module,
        source,
        lambda module, batch: method.terms(pair.taught(module, batch)),
        method,
        method.steps or math.ceil(method.epochs * per_epoch),
        context,
        folder.resume,
        validate=validation(method, pair, inputs, context),
    )
    return finish(student, log, inputs, folder)


class Prompts(Examples):
    """Prompts as token ids, each with the completion of the data where there is one."""

    def __init__(self, rows: Rows, student: Model, prompt_tokens: int, length: int) -> None:
        tokenizer = student.encoder.tokenizer
        room = min(length, student.encoder.context or length)
        if {"prompt", "completion"} <= rows.columns.keys() or "prompt" not in rows.columns:
            known = student.encoder.encode(rows, room).batch  # as every other method reads them
            count = len(student.encoder.encode(rows, room))
            self._pairs = [_cut(known([place]), prompt_tokens) for place in range(count)]
        else:
            texts = [str(text) for text in rows.columns["prompt"]]
            end = tokenizer.eos_token_id
            encoded = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in tokenizer(texts)["input_ids"]]
            self._pairs = [(ids[-(room - 1) :], []) for ids in encoded]
        self._pairs = [(prompt, completion) for prompt, completion in self._pairs if prompt]
        if not self._pairs:
            raise RequestError(f"{rows.origin}: has no prompts to go on from")
        self.whole = all(completion for _, completion in self._pairs)
        self.room = room

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(self, indices: Sequence[int]) -> Batch:
        prompts, completions = zip(*(self._pairs[i] for i in indices), strict=True)
        return {"prompts": list(prompts), "completions": list(completions)}


def _cut(example: Batch, prompt_tokens: int) -> tuple[list[int], list[int]]:
    """Return prompt and completion of one example: what has no label, or the first tokens of a plain text."""
    ids, labels = example["input_ids"][0].tolist(), example["labels"][0].tolist()
    free = next((place for place, label in enumerate(labels) if label != IGNORE), 0)
    at = free or min(prompt_tokens, len(ids) - 1)
    return ids[:at], ids[at:]


class Mixed:
    """Batches that are completed by the student, the teacher, or the data, as the method has it."""

    def __init__(self, method: OnPolicy, prompts: Prompts, teacher: Model, student: Model, seed: int) -> None:
        self._method = method
        self._prompts = prompts
        self._teacher = teacher
        self._student = student
        self._epochs = Epochs(prompts, method.batch_size, seed)

    def batch(self, number: int) -> Batch:
        """Return a batch; all randomness comes from torch's generator, which is that of the step."""
        drawn = self._epochs.batch(number)
        prompts, completions = drawn["prompts"], drawn["completions"]
        author = self._method.author(float(torch.rand(())))
        if author != "data":
            completions = self._written(author, prompts)
        ids = [torch.tensor([*prompt, *more]) for prompt, more in zip(prompts, completions, strict=True)]
        labels = [
            torch.tensor([IGNORE] * len(prompt) + more) for prompt, more in zip(prompts, completions, strict=True)
        ]
        return Given(ids, labels).batch(range(len(ids)))

    def _written(self, author: str, prompts: Sequence[list[int]]) -> list[list[int]]:
        method, module = self._method, self._student.module
        how = Sampling(temperature=method.sampling_temperature, top_p=method.top_p)
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        rooms = [min(len(prompt) + method.max_new_tokens, self._prompts.room) for prompt in prompts]
        with still(module):
            stepper = ModuleStepper(module) if author == "student" else self._teacher.stepper()
            made = continued(stepper, prompts, rooms, how, draws, self._student.wording.ends)
        return [tokens for tokens, _ in made]
