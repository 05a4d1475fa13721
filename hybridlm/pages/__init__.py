"""The pages of reports: what is on them, how it is drawn, and how it becomes HTML and Markdown."""
