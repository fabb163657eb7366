"""`python -m demo_model.report`."""

from demo_model.report.report import main

main()
