from .baseline_table import Baseline as Baseline
from .baseline_table import baselines_to_markdown as baselines_to_markdown
from .page import render_report as render_report
from .page import save_report as save_report
from .plots import draw_baselines as draw_baselines
from .plots import draw_curves as draw_curves
from .plots import draw_locations as draw_locations
from .plots import draw_metrics as draw_metrics
