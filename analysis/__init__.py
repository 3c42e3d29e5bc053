"""Statistics, figures and the report, on any table of models; no torch, no ray."""
