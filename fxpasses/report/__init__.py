"""What happened in a compilation: remarks, counters, the layout plan and drawings, as text and as a page."""

from __future__ import annotations

from fxpasses.report.data import SCHEMA as SCHEMA
from fxpasses.report.data import Remark as Remark
from fxpasses.report.data import Status as Status
from fxpasses.report.report import Report as Report
