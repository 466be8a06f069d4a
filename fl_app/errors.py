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
    ├── TeacherFailed        the professional gave no usable answer
    ├── RunInvalid           a run directory cannot be continued or read
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
    """A message holds a key, kind or shape that may not travel."""


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


class TeacherFailed(StillroomError):
    """The professional model gave no usable answer."""


class RunInvalid(StillroomError):
    """A run directory cannot be continued or read."""


class RoundFailed(StillroomError):
    """A round has no result."""
