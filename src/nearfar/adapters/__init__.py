"""nearfar inside other libraries: one file, or one folder, for each of them.

An adapter is imported only where it is asked for, `from nearfar.adapters import open_clip`, and is
the only place that imports its library.
"""
