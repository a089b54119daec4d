"""TurboMind, lmdeploy's C++ engine, as the wheel has it: patched in memory, so that plans decide.

What each file holds, from the library up: wheel (is it the lmdeploy that the patches are made for),
build (the patches of third_party/patches/lmdeploy, compiled into a cache), abi, native_events and
native (their C functions from Python), patching (all of that, or stock); options, loading and
sessions (lmdeploy's own engine, and requests in it), toy (the same without a GPU), opening (all of
it as one instance); rows and residents (requests here and their sessions), plans (for the native
side), prefixes, handovers, reports (steps as events), engine. programs runs somebody else's program
with the patches.
"""

from sagec.runtime.engines import Engine, EngineError, InstanceSpec


def create(spec: InstanceSpec) -> Engine:
    """TurboMind with the checkpoint of `spec` loaded, patched, and ready for plans.

    Its options are those of `sagec.runtime.engines.turbomind.options.Options`, all given as text.

    Raises EngineError where lmdeploy is missing or of another version, cannot be patched, has no
    GPU to run on, or where an option or the checkpoint is wrong.
    """
    try:
        from sagec.runtime.engines.turbomind.engine import TurboMindEngine
    except ImportError as error:
        raise EngineError(
            f"instance {spec.id!r}: the turbomind engine needs {error.name}; "
            "install it with: pip install 'sagec[turbomind]'"
        ) from None
    return TurboMindEngine(spec)
