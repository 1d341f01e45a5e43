"""ipywidgets over a session's reports. No logic: a button calls a method and shows its code."""
