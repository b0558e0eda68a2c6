"""An ONNX Runtime session on the provider that was asked for, or an error that says why not.

ONNX Runtime would rather go on with the CPU: when a provider's library is missing, when it knows an option not, and for each
node that it does not take. Here each of these is a ProviderError.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from samescore.runtime.bundle import ModelBytes
from samescore.runtime.errors import BundleError, ProviderError, SamescoreError
from samescore.runtime.libraries import missing_library, preload, remedy
from samescore.runtime.placement import RECORD_ENTRY, Placement, placement_of, strays
from samescore.runtime.providers import plugin_devices, provider_name

log = logging.getLogger(__name__)

# Larger weights do not fit into the protobuf that MIGraphX gets, together with the rest of the graph.
INLINE_BYTES = 1_500_000_000
# CUDA: TensorFloat-32 keeps 10 bits of float32 operands' mantissas; memory grows by what is needed, not by powers of two.
DEFAULT_OPTIONS: dict[str, dict[str, str]] = {"cuda": {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}}
# ONNX Runtime prefers this folder to the session's own option (1.27), and its names of programs do not tell models apart.
SHARED_CACHE = "ORT_MIGRAPHX_MODEL_CACHE_PATH"
MIGRAPHX_PRECISION = tuple(f"ORT_MIGRAPHX_{name}_ENABLE" for name in ("FP16", "BF16", "FP8", "INT8"))
# Of CUDA's attention kernels; the number is its bit in the option sdpa_kernel.
NO_EFFICIENT_ATTENTION, EFFICIENT_ATTENTION = "ORT_DISABLE_MEMORY_EFFICIENT_ATTENTION", 2
GPU_ONLY = "GatedDeltaNet"
# ONNX Runtime's exceptions that are about the file, whatever the provider.
GRAPH_ERRORS = {"InvalidProtobuf", "InvalidGraph", "NoModel", "NoSuchFile"}
# Parts of the messages about operators, opsets and file versions that are newer than the ONNX Runtime.
TOO_OLD = (
    "is not a registered function/op",
    "Could not find an implementation for",
    "No Op registered for",
    "Unsupported model IR version",
    "is under development and support for this is limited",
)


def hand_over_weights(options: Any, model: ModelBytes, target: str) -> bool:
    """Tell ONNX Runtime where the external data is, verified bytes in either case. Whether it takes them from memory.

    From memory, without a copy, where it can. ONNX Runtime before 1.24 cannot. And it would write weights from memory into
    the graph that it serializes for MIGraphX, a protobuf of at most 2 GiB; those of a file stay outside it.
    """
    size = sum(map(len, model.data.values()))
    from_memory = hasattr(options, "add_external_initializers_from_files_in_memory")
    if from_memory and not (target == "migraphx" and size > INLINE_BYTES):
        names, buffers = list(model.data), list(model.data.values())
        options.add_external_initializers_from_files_in_memory(names, buffers, [len(buffer) for buffer in buffers])
        return True
    try:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.on_disk))
    except OSError as error:
        raise ProviderError(
            f"{target} reads weights from a file here, and a private copy of them ({size / 1e6:.0f} MB) could not be written: "
            f"{error.strerror}. Set TMPDIR to a folder with room for it"
        ) from error
    return False


def options_for(ort: Any, target: str, intra_op_threads: int, low_memory: bool, *, spinning: bool = False) -> Any:
    """`onnxruntime.SessionOptions` for a target, with so many threads per call.

    spinning: threads wait for a call's next operator without giving the CPU away; between calls they never do.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    # Spinning pools of several sessions, or next to other work, slow each other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if spinning:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    # Borrow the mapped weights instead of copying them (ONNX Runtime >= 1.31; older ones ignore the entry).
    options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
    if low_memory:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if target != "cpu":
        options.add_session_config_entry(RECORD_ENTRY, "1")
    if target not in ("cpu", "cuda") and not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        # It names no operator, but an ONNX Runtime that keeps no record of the placement has no other check. (On CUDA the
        # arithmetic of shapes belongs on the CPU.)
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if target == "migraphx":
        # Folded constants would be inlined into the graph handed to MIGraphX, which caps it at 2 GiB.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def open_session(ort: Any, graph: bytes, session_options: Any, target: str, options: Mapping[str, str]) -> Any:
    """An `onnxruntime.InferenceSession` on the asked provider."""
    provider = provider_name(target)
    if target == "cpu" and options:
        raise ProviderError(
            f"provider cpu has no options, got {', '.join(options)}: leave them out, or name another provider"
        )
    if target == "cuda":
        _refuse_other_attention(options)
        preload(ort)
    if target == "migraphx":
        _refuse_environment(options)
    merged = {**DEFAULT_OPTIONS.get(target, {}), **options}
    try:
        if provider in ort.get_available_providers():
            session = ort.InferenceSession(graph, session_options, providers=[(provider, merged)], enable_fallback=0)
        else:
            session_options.add_provider_for_devices(plugin_devices(ort, provider)[:1], merged)
            session = ort.InferenceSession(graph, session_options, enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
        raise _explained(ort, target, options, error) from error
    used = session.get_providers()[0]
    if used != provider:
        missing = missing_library(ort, provider)
        why = f"{missing}. {remedy(provider)}" if missing else "it does not say why; its log on stderr may"
        raise ProviderError(f"{provider} was asked for, but ONNX Runtime {ort.__version__} fell back to {used}: {why}")
    return session


def _refuse_environment(options: Mapping[str, str]) -> None:
    """ProviderError where the environment or an option makes MIGraphX compute in another precision than the certified file, or
    keep compiled programs where it would take those of another model.
    """
    if os.environ.get(SHARED_CACHE):
        raise ProviderError(
            f"{SHARED_CACHE} is set to {os.environ[SHARED_CACHE]!r}: ONNX Runtime would keep compiled programs there, by names "
            f"that say nothing of the weights, and could run those of another model. Unset it (unset {SHARED_CACHE}); "
            "SAMESCORE_CACHE chooses the folder"
        )
    for name in (variable.removeprefix("ORT_").lower() for variable in MIGRAPHX_PRECISION):
        if options.get(name, "0").lower() not in ("0", "false"):
            raise ProviderError(
                f"provider option {name}={options[name]} changes the precision of the graph: the bundle's certificate would not "
                "hold. Leave it away; a bundle's variants have their own precision"
            )
    for name in MIGRAPHX_PRECISION:
        if os.environ.get(name, "0") not in ("", "0"):
            raise ProviderError(
                f"the environment sets {name}={os.environ[name]}, which changes the precision of every graph that MIGraphX "
                "compiles: the bundle's certificate would not hold. Unset it; a bundle's variants have their own precision"
            )


def _refuse_other_attention(options: Mapping[str, str]) -> None:
    """ProviderError where padded texts would meet an attention kernel that misreads where each of them ends.

    The masks of BERT's files for CUDA are made for the memory-efficient kernel.
    """
    if os.environ.get(NO_EFFICIENT_ATTENTION, "0") not in ("", "0"):
        raise ProviderError(
            f"the environment sets {NO_EFFICIENT_ATTENTION}: other kernels of CUDA misread the masks of padded texts, and "
            f"scores would be wrong. Unset it (unset {NO_EFFICIENT_ATTENTION})"
        )
    asked = options.get("sdpa_kernel", "0")
    if asked != "0" and not (asked.isdecimal() and int(asked) & EFFICIENT_ATTENTION):
        raise ProviderError(
            f"provider option sdpa_kernel={asked} leaves out memory-efficient attention ({EFFICIENT_ATTENTION}), without which "
            "padded texts would be scored wrong: leave the option away"
        )


def _explained(ort: Any, target: str, options: Mapping[str, str], error: Exception) -> SamescoreError:
    """What an exception of ONNX Runtime means: about the provider, this ONNX Runtime's age, or the graph."""
    provider, text = provider_name(target), str(error)
    if missing := missing_library(ort, provider):
        return ProviderError(f"{provider} cannot be loaded: {missing}. {remedy(provider)}")
    if "nknown provider option" in text or "Failed to parse provider option" in text:
        asked = ", ".join(f"{name}={value}" for name, value in options.items()) or "none"
        return ProviderError(
            f"{provider} of ONNX Runtime {ort.__version__} refuses a provider option (asked: {asked}): {text}"
        )
    if target == "cpu" and GPU_ONLY in text:
        return ProviderError(
            f"this graph holds an operator that no CPU can run ({text.rstrip('. ')}): run it on CUDA, or take another variant "
            "of the bundle"
        )
    if any(part in text for part in TOO_OLD):
        return ProviderError(
            f"ONNX Runtime {ort.__version__} does not know all operators of this graph on {target}: {text.rstrip('. ')}. "
            "Install a newer one, or use a portable variant (migraphx-fp16), which older ones can read"
        )
    if target != "cpu" and type(error).__name__ not in GRAPH_ERRORS:
        return ProviderError(
            f"{provider} of ONNX Runtime {ort.__version__} could not make a session of this graph: {text}"
        )
    return BundleError(f"ONNX Runtime {ort.__version__} cannot load this graph on {target}: {text}")


def checked_placement(ort: Any, session: Any, target: str) -> Placement | None:
    """The session's placement; ProviderError where operators compute on another provider than the one asked for."""
    if target == "cpu":
        return None
    provider = provider_name(target)
    placement = placement_of(session)
    if placement is None:
        told = f"ONNX Runtime {ort.__version__} does not tell"
        if hasattr(session, "get_provider_graph_assignment_info"):
            raise ProviderError(f"{told} where the operators lie, although it could: {provider} cannot be relied on")
        if target == "cuda":  # the others were told to refuse the CPU instead
            log.warning("%s whether all operators run on %s", told, provider)
        return None
    if elsewhere := strays(placement, provider):
        listed = ", ".join(f"{count} {name}" for name, count in elsewhere.items())
        raise ProviderError(
            f"{provider} was asked for, but it leaves {sum(elsewhere.values())} nodes of this graph to the CPU: {listed} "
            f"(it takes {placement.count(provider)}). Use the variant made for it, or provider cpu"
        )
    return placement
