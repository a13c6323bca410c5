from .in_place import detach as detach
from .in_place import merge_in_place as merge_in_place
from .stream_merge import MergeSummary as MergeSummary
from .stream_merge import merge_checkpoint as merge_checkpoint
