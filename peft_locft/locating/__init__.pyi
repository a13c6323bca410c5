from .module_kinds import KINDS as KINDS
from .module_kinds import location_of as location_of
from .plan import Candidate as Candidate
from .plan import Rung as Rung
from .preset import LocationPreset as LocationPreset
from .results import LocationSearchResult as LocationSearchResult
from .results import LocationTrial as LocationTrial
from .score import LocationScore as LocationScore
