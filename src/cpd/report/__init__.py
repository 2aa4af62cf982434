"""The report: what was measured before and after, how it came about, as JSON, table and page."""

from cpd.report.environment import environment
from cpd.report.measures import Measures
from cpd.report.pictures import Picture, picture
from cpd.report.value import Report

__all__ = ["Measures", "Picture", "Report", "environment", "picture"]
