"""The page in the browser: ``sdkit ui``. `studio` does the work, `page` shows it."""
