from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tinylora", "tinylora.*"]), "tinylora.kernels"],
    package_dir={"tinylora.kernels": "kernels"},
)
