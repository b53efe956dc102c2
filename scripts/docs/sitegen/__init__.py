"""The documentation's generated part: pages, pictures, plots and equations, all from the registries and the recorded evidence."""
