"""Examples with evidence: on disk, from other formats, generated."""

from mmlens.data.examples import DataError as DataError
from mmlens.data.examples import Evidence as Evidence
from mmlens.data.examples import Example as Example
from mmlens.data.examples import load_examples as load_examples
from mmlens.data.examples import save_examples as save_examples
from mmlens.data.images import LateImage as LateImage
from mmlens.data.images import load_image as load_image
from mmlens.data.many import Examples as Examples
from mmlens.data.many import ExampleStream as ExampleStream
from mmlens.data.published.loading import load_data as load_data
from mmlens.data.rows import examples_from as examples_from
from mmlens.data.scenes import draw_scene as draw_scene
from mmlens.data.scenes import iterate_scenes as iterate_scenes
from mmlens.data.scenes import scene_examples as scene_examples
from mmlens.data.scenes import scene_of as scene_of
from mmlens.data.splits import split_examples as split_examples
from mmlens.data.videos import Video as Video
