"""One tree of errors; every message names the value and the way out.

    StillroomError
    ├── ConfigInvalid        a file or an override says something we do not understand
    ├── RowsInvalid          a row of a corpus or of a site cannot be read
    ├── ModelMissing         a model reference resolves to nothing on this machine
    ├── DeploymentUnsafe     a process, key or certificate is not fit to be started in production
    ├── OriginShadowed       another package answers to one of our names
    ├── WireViolation        a message holds a key, kind or shape that may not travel
    ├── AdapterMismatch      two adapters differ in base, layers, rank or scaling
    ├── LedgerRefusal        the site's ledger says no
    │   ├── BudgetSpent      the remaining budget does not carry what was asked
    │   └── LedgerCorrupt    the file is torn, foreign or was changed by hand
    ├── PolicyRefusal        the site's own policy forbids what the server asks
    ├── AuditBroken          the audit log was changed, cut, or cannot be written
    ├── TeacherFailed        the professional gave no usable answer
    ├── NotFinite            a model computed NaN or infinity where a number is needed
    ├── RunInvalid           a run directory cannot be continued or read
    ├── DiskFull             a file could not be written whole, or there is too little space to begin
    └── RoundFailed          a round has no result; the run stops and says why

Out of scope: what travels. An error raised on a site never leaves it; `clients.local_round` sends a `Refusal`
with one of the codes of `fl_app.types.REFUSAL_CODES` and keeps the text in the site's own log.
"""


class StillroomError(Exception):
    """Root of everything we raise on purpose."""


class ConfigInvalid(StillroomError):
    """A configuration file, override or policy cannot be understood."""


class RowsInvalid(StillroomError):
    """A row of a corpus or of a site cannot be read."""


class ModelMissing(StillroomError):
    """A model reference resolves to nothing on this machine."""


class DeploymentUnsafe(StillroomError):
    """A process, key or certificate of a deployment is not fit to be started in production."""


class OriginShadowed(StillroomError):
    """Another installed package answers to one of our top-level names."""


class WireViolation(StillroomError):
    """A message holds a key, kind or shape that may not travel: `rule` names what it broke, `tensor` where."""

    def __init__(self, reason: str, *, rule: str = "keys", tensor: str = "") -> None:
        super().__init__(f"{tensor[:80]!r} {reason}" if tensor else reason)
        self.reason, self.rule, self.tensor = reason, rule, tensor


class AdapterMismatch(StillroomError):
    """Two adapters differ in base model, layers, rank or scaling."""


class LedgerRefusal(StillroomError):
    """The site's ledger says no."""


class BudgetSpent(LedgerRefusal):
    """The remaining budget does not carry what was asked."""


class LedgerCorrupt(LedgerRefusal):
    """The ledger is torn in the middle, foreign, or was changed by hand."""


class PolicyRefusal(StillroomError):
    """The site's own policy forbids what the server asks."""


class AuditBroken(StillroomError):
    """The audit log was changed, cut, or cannot be written."""


class TeacherFailed(StillroomError):
    """The professional model gave no usable answer."""


class NotFinite(StillroomError):
    """A model computed NaN or infinity where a number is needed."""


class DiskFull(StillroomError):
    """A file could not be written whole, or there is too little space to begin."""


class RunInvalid(StillroomError):
    """A run directory cannot be continued or read."""


class RoundFailed(StillroomError):
    """A round has no result."""
