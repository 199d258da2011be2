from .api import load as load
from .api import merge as merge
from .api import open as open
from .api import undo as undo
from .api import unlearn as unlearn
from .audit.run import audit as audit
from .errors import DelibleError as DelibleError
from .gateway.serving import serve as serve
from .records import QA as QA
from .records import Choice as Choice
from .records import Dialogue as Dialogue
from .records import ForgetRequest as ForgetRequest
from .records import Passage as Passage
from .registry import register as register
from .sequence.run import unlearn_sequence as unlearn_sequence
from .systems.guarded import guard as guard
from .world import World as World

__version__: str
