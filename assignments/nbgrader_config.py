"""nbgrader's configuration of this folder: run `nbgrader generate_assignment NAME` here."""

c = get_config()  # noqa: F821 (traitlets puts it there)
c.CourseDirectory.course_id = "elign_lab"
# seconds; with the defaults (30 and 4) a busy machine gives no marks
c.Execute.timeout = 600
c.Execute.iopub_timeout = 120
