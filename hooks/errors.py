"""The one error class, and what others mean."""


class RcProbeError(ValueError):
    """What went wrong, where, and what to do next, in one line.

    Parameters
    ----------
    what: what happened, with the value that was wrong
    where: the model, block, file or option concerned
    todo: what the reader can do next
    """

    def __init__(self, what: str, *, where: str | None = None, todo: str | None = None) -> None:
        self.what, self.where, self.todo = what, where, todo
        where, what = where and _short(where), _short(what)
        line = f"{where}: {what}" if where else what
        end = "" if line.endswith((".", "?", "!")) else "."
        super().__init__(" ".join((f"{line}{end} {todo}" if todo else line).splitlines()))


def _short(text: str, most: int = 500) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-most // 3 :]}"


def out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate, on the GPU or on the CPU."""
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or isinstance(error, MemoryError)


def reason(error: BaseException) -> str:
    """The first line of what an error says, or else its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
