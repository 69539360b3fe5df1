"""Reports: tables, figures and pages. Only this folder converts numbers to units for display. No torch."""
