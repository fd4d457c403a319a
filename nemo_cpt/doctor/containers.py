"""Whether Docker can run the job's container here."""

import contextlib

from nemo_cpt.doctor.examination import Examination, Finding, from_error
from nemo_cpt.errors import CptError


def docker(examination: Examination) -> Finding:
    """Whether a Docker engine answers, and has an image that no registry could give it."""
    name, image = "Docker", examination.place.image
    if image is None:
        return Finding(name, "skipped", "the job is none of Docker's")
    try:
        check_engine(image)
    except CptError as error:
        return from_error(name, error)
    return Finding(name, "ok", f"an engine answers, to run {image}")


def check_engine(image: str) -> None:
    """Raise CptError unless a Docker engine answers on this machine, and has the image if no registry could."""
    import docker as client  # NeMo-Run's own requirement

    try:
        engine = client.from_env()  # which asks it for its version
    except client.errors.DockerException as error:
        reason = " ".join(str(error).split())
        raise CptError(
            f"no Docker engine answers here ({reason}): install it, or start it (`systemctl start docker`), and let "
            "this user reach it (`docker ps` must work); DOCKER_HOST names another"
        ) from None
    with contextlib.closing(engine):
        # Any other image Docker itself gets, from the registry that its name says.
        if image.startswith("localhost/"):
            try:
                engine.images.get(image)
            except client.errors.ImageNotFound:
                raise CptError(
                    f"there is no image {image} here: build it in the checkout (`docker build --tag {image} .`), "
                    "or give docker(image=...)"
                ) from None
