"""Studies: a grid of compressions, run one by one and never twice, as one table and its figures."""

from cpd.study.grid import Cell, Study
from cpd.study.pages import records, table, write
from cpd.study.run import Costs, Outcome, run

__all__ = ["Cell", "Costs", "Outcome", "Study", "records", "run", "table", "write"]
