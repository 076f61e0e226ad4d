"""Plans distillation, loads teacher and student, and leaves the loop to what the method learns from."""

from __future__ import annotations

from lfm.checkpoint import OutputFolder
from lfm.distill._contract import BlackBox, DataFree, Folded, Inputs, Matching, OnPolicy, Smaller, Written
from lfm.errors import RequestError
from lfm.method import Access, Data, Method
from lfm.models.ref import ModelRef
from lfm.models.shrink import DEPTHS
from lfm.recipe.step import Context, Outline, StepPlan, StepResult

STATES = 16  # bytes that a weight takes in training: itself, its gradient, two moments


def plan(method: Method, inputs: Inputs, context: Context) -> StepPlan:
    """Return what distillation will read, write and take, and everything that speaks against it."""
    problems = _data_problems(method, inputs, context)
    refs = [inputs.teacher, *([inputs.student] if isinstance(inputs.student, ModelRef) else [])]
    try:
        outlines = context.outlines(refs)
    except RequestError as error:
        raise RequestError(*problems, *error.problems) from None
    teacher, student = outlines[0], outlines[-1]
    problems += _teacher_problems(method, teacher, context)
    if isinstance(inputs.student, Smaller):
        problems += _smaller_problems(inputs, teacher)
    elif student.access < Access.WEIGHTS:
        problems.append(f"{student.ref.label}: a student has to be trained, and offers no weights")
    elif _reads_alike(method):
        problems += _tokenizer_problems(teacher, student)
    floats = sum(spec.size for spec in student.specs.values())
    output = Outline(context.resolve(student.ref), student.specs, student.config, student.vocabulary)
    reads = sum(outline.nbytes for outline in outlines)
    memory = sum(spec.size for spec in teacher.specs.values()) * 4 + floats * STATES
    notes = [f"asks the teacher about {method.queries:,} inputs"] if isinstance(method, BlackBox) else []
    return StepPlan(output, reads, floats * 4, memory, problems=tuple(problems), notes=tuple(notes))


def _data_problems(method: Method, inputs: Inputs, context: Context) -> list[str]:
    name = type(method).__name__
    problems: list[str] = []
    if type(method).needs.data is Data.NONE:
        given = [role for role in ("data", "validation") if getattr(inputs, role) is not None]
        return [f"{role}: {name} makes its own inputs and reads no data; leave it out" for role in given]
    if inputs.data is None:
        problems.append(f"{name} learns on examples; give `data`")
    if isinstance(method, BlackBox) and inputs.validation is not None:
        problems.append(f"validation: {name} measures agreement on a part of its queries; leave it out")
    for role, spec in (("data", inputs.data), ("validation", inputs.validation)):
        try:
            if spec is not None:
                context.rows(spec)
        except RequestError as error:
            problems += [f"{role}: {problem}" for problem in error.problems]
    if isinstance(method, (Matching, OnPolicy)) and method.patience is not None and inputs.validation is None:
        problems.append("patience needs validation data to watch; give `validation:` (for example `part: held_out`)")
    return problems


def _reads_alike(method: Method) -> bool:
    """Whether the student has to have the teacher's tokenizer."""
    if isinstance(method, Written):
        return method.answers not in ("best", "text")
    return isinstance(method, (OnPolicy, Matching))


def _teacher_problems(method: Method, teacher: Outline, context: Context) -> list[str]:
    if isinstance(method, (Written, OnPolicy)):
        return _writer_problems(method, teacher)
    if isinstance(method, Folded) and _writes_text(teacher):
        return [f"{teacher.ref.label}: writes text; an output layer is put in place of a classifier's alone (fitnets)"]
    if not isinstance(method, (DataFree, BlackBox)):
        return []
    ref = context.resolve(teacher.ref)
    if ref.module and ref.image is None:
        return [
            f"{teacher.ref.label}: what its images are like is not known; give it `image: {{size: ..., mean: ...}}`"
        ]
    return []


def _writer_problems(method: Written | OnPolicy, teacher: Outline) -> list[str]:
    label = teacher.ref.label
    if not _writes_text(teacher, unless_known=True):
        return [f"{label}: writes no text, and a teacher that does is needed (causal-lm)"]
    if isinstance(method, Written):
        needed = {"logits": Access.LOGITS, "top_k": Access.PROBS}.get(method.answers, Access.LABELS)
        if teacher.access < needed:
            told = f"offers {teacher.access.name.lower()}, and answers: {method.answers} takes {needed.name.lower()}"
            return [f"{label}: {told}; use answers: best"]
    if isinstance(method, OnPolicy) and teacher.ref.is_endpoint:
        return [f"{label}: gives no probabilities of texts that it is shown; use sequence or self_generated"]
    return []


def _writes_text(teacher: Outline, *, unless_known: bool = False) -> bool:
    """Whether a model writes text, as far as its task and its architecture tell."""
    names = [str(name) for name in (teacher.config or {}).get("architectures") or ()]
    if teacher.ref.task is not None:
        return teacher.ref.task == "causal-lm"
    if any("Classification" in name for name in names):
        return False
    return unless_known or any("CausalLM" in name or "LMHead" in name for name in names)


def _smaller_problems(inputs: Inputs, teacher: Outline) -> list[str]:
    """Return what speaks against a student that is made from the teacher."""
    if teacher.access < Access.WEIGHTS or teacher.ref.is_endpoint or not teacher.config:
        return [f"{teacher.ref.label}: a student is made from a transformers model with its weights; name a student"]
    asked = inputs.student.layers if isinstance(inputs.student, Smaller) else None
    count = next((teacher.config[key] for key in DEPTHS if isinstance(teacher.config.get(key), int)), None)
    most = max(asked) + 1 if isinstance(asked, list) else asked
    if most is not None and count is not None and most > count:
        return [f"student: {teacher.ref.label} has {count} layers, and {asked} were asked for"]
    return []


def _tokenizer_problems(teacher: Outline, student: Outline) -> list[str]:
    """Return a line if both read text, each in its own way: ids of one would mean other text to the other."""
    one, other = teacher.vocabulary, student.vocabulary
    if not one or not other or dict(one) == dict(other):
        return []
    differ = sum(one.get(token) != index for token, index in other.items())
    return [
        f"teacher and student have different tokenizers ({differ:,} of {len(other):,} tokens differ); "
        "choose a student with the teacher's, or teach it by text (`distill: sequence`)"
    ]


def run(method: Method, inputs: Inputs, context: Context, folder: OutputFolder) -> StepResult:
    """Distill into `folder`."""
    if isinstance(method, Matching):
        from lfm.distill._matching import learn_on_data

        return learn_on_data(method, inputs, context, folder)
    if isinstance(method, DataFree):
        from lfm.distill._synthesis import learn_without_data

        return learn_without_data(method, inputs, context, folder)
    if isinstance(method, BlackBox):
        from lfm.distill._asking import learn_by_asking

        return learn_by_asking(method, inputs, context, folder)
    if isinstance(method, Written):
        from lfm.distill._writing import learn_from_writing

        return learn_from_writing(method, inputs, context, folder)
    if isinstance(method, OnPolicy):
        from lfm.distill._on_policy import learn_on_policy

        return learn_on_policy(method, inputs, context, folder)
    raise AssertionError(f"{type(method).__name__} is no way to distill")


__all__ = ["plan", "run"]
