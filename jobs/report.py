"""The HTML report of everything that is done."""

from ultralong_ray.job import run_stages

if __name__ == "__main__":
    run_stages("report")
