"""initialize, initialized, settings, shutdown: what happens once, and when the editor's configuration changes."""

import asyncio
import importlib
import logging
import uuid
from contextlib import aclosing

from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.lsp.server import LanguageServer

from agent.errors import TabwiseError
from lsp.documents import Units
from lsp.features import inline_completion
from lsp.state import State

log = logging.getLogger(__name__)

SECTION = "tabwise"
_CLIENT_S = 5.0  # for the client to answer a request of ours; some never do
_LATE_IMPORTS = ("agent.client", "agent.config")


def register(server: LanguageServer, state: State) -> None:
    """Answer the messages."""

    @server.feature(types.INITIALIZE)
    def initialize(params: types.InitializeParams) -> None:
        state.units = _units(params)
        state.roots = [folder.uri for folder in params.workspace_folders or ()] or [
            uri for uri in (params.root_uri,) if uri
        ]
        options = params.initialization_options
        state.link.on_loading = lambda: state.spawn(_show_loading(server, state))
        state.settings.start(options.get(SECTION, options) if isinstance(options, dict) else options)
        state.refreshes = _refreshes(params.capabilities.experimental)
        text_document = params.capabilities.text_document
        if text_document is None or text_document.inline_completion is None:
            inline_completion.register_list(server, state)

    @server.feature(types.INITIALIZED)
    async def initialized(params: types.InitializedParams) -> None:
        del params
        state.spawn(_start(server, state))

    @server.feature(types.WORKSPACE_DID_CHANGE_CONFIGURATION)
    async def did_change_configuration(params: types.DidChangeConfigurationParams) -> None:
        if _can_ask(server):
            await _ask_settings(server, state)
        elif isinstance(params.settings, dict):
            state.settings.change(params.settings.get(SECTION))
            state.completions.look_again()
        await _tell_problems(server, state)

    @server.feature(types.WORKSPACE_DID_CHANGE_WORKSPACE_FOLDERS)
    async def did_change_workspace_folders(params: types.DidChangeWorkspaceFoldersParams) -> None:
        removed = {folder.uri for folder in params.event.removed}
        state.roots = [uri for uri in state.roots if uri not in removed]
        state.roots += [folder.uri for folder in params.event.added]
        state.completions.look_again()

    @server.feature(types.SHUTDOWN)
    async def shutdown(params: None) -> None:
        del params
        for task in state.tasks:
            task.cancel()
        state.completions.close()
        await state.link.close()


async def _start(server: LanguageServer, state: State) -> None:
    # In a thread: what is imported here would otherwise hold up the first messages.
    for name in _LATE_IMPORTS:
        await asyncio.to_thread(importlib.import_module, name)
    if _can_ask(server):
        await _ask_settings(server, state)
    await _tell_problems(server, state)
    try:
        await _warm(server, state)
    except TabwiseError as error:
        log.error("the model is not ready: %s", error)
        _show(server, f"Tabwise: {error}")


async def _show_loading(server: LanguageServer, state: State) -> None:
    try:
        await _warm(server, state, loading=True)
    except TabwiseError as error:
        log.error("the model is not ready: %s", error)  # the request that wants it tells its own story


async def _warm(server: LanguageServer, state: State, *, loading: bool = False) -> None:
    """Have the model loaded, and show that it takes a moment where it does.

    Args:
        server: Where to show it.
        state: Where the line to the daemon is.
        loading: It is known already that the model is being loaded.
    """
    window = server.client_capabilities.window
    shows_progress = bool(window and window.work_done_progress)
    token = await _begin_progress(server) if loading and shows_progress else None
    try:
        async with aclosing(state.link.warm()) as states:
            async for now in states:
                if now == "loading" and shows_progress and token is None:
                    token = await _begin_progress(server)
    finally:
        if token is not None:
            server.work_done_progress.end(token, types.WorkDoneProgressEnd())


async def _begin_progress(server: LanguageServer) -> str | None:
    token = f"tabwise-{uuid.uuid4().hex}"
    try:
        await asyncio.wait_for(server.work_done_progress.create_async(token), _CLIENT_S)
    except (JsonRpcException, TimeoutError):
        return None  # a client that promised progress and does not show it: the model is loaded all the same
    server.work_done_progress.begin(token, types.WorkDoneProgressBegin(title="Tabwise: loading the model"))
    return token


async def _ask_settings(server: LanguageServer, state: State) -> None:
    asked = types.ConfigurationParams(items=[types.ConfigurationItem(section=SECTION)])
    try:
        answer = await asyncio.wait_for(server.workspace_configuration_async(asked), _CLIENT_S)
    except (JsonRpcException, TimeoutError) as error:
        log.warning("the client did not tell its settings (%s); those of the file hold", type(error).__name__)
        return
    state.settings.change(answer[0] if answer else None)
    state.completions.look_again()


async def _tell_problems(server: LanguageServer, state: State) -> None:
    await state.settings.current()
    problems = state.settings.take_problems()
    if problems:
        for problem in problems:
            log.error("settings: %s", problem)
        _show(server, "Tabwise settings: " + "; ".join(problems))


def _show(server: LanguageServer, message: str) -> None:
    server.window_show_message(types.ShowMessageParams(type=types.MessageType.Warning, message=message))


def _can_ask(server: LanguageServer) -> bool:
    workspace = server.client_capabilities.workspace
    return bool(workspace and workspace.configuration)


def _refreshes(experimental: object) -> bool:
    # Whatever a client puts there arrives as a dictionary or, from pygls's converter, as an object with attributes.
    ours = experimental.get(SECTION) if isinstance(experimental, dict) else getattr(experimental, SECTION, None)
    return bool(ours.get("refresh") if isinstance(ours, dict) else getattr(ours, "refresh", False))


def _units(params: types.InitializeParams) -> Units:
    general = params.capabilities.general
    offered = general.position_encodings if general and general.position_encodings else ()
    # The first that the client lists: it is the one that the client prefers, and pygls advertises the same.
    return next(
        (Units(str(getattr(one, "value", one))) for one in offered if getattr(one, "value", one) in list(Units)),
        Units.UTF16,
    )
