"""The command line, studies, the plan, and the runners that carry it out."""
