"""
Starts scripts without waiting for their imports: one process imports the libraries once, and every start is a fork of it.

    tests/conftest.py starts it with a socket as its standard input and talks to it by Forks.run

The forked process is a script's own process in all else: its arguments, environment, folder, output, exit code. What a true
start has and this has not: the import of the libraries by the script's own lines, a seed of its own for the hashes of strings,
and at the end the interpreter's taking apart of every library, 2 s of work. --help and every start under torchrun have them.
Linux only.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types


class Forks:
    """The server, seen from the tests; it ends with them, when its socket is closed."""

    def __init__(self, env):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen([sys.executable, __file__], stdin=theirs, stdout=subprocess.DEVNULL, env=env)
        theirs.close()

    def run(self, command, cwd, env, timeout):
        """subprocess.run([python, *command], text=True, capture_output=True), by a fork; any thread may call it."""
        read, write = os.pipe()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(read) as report:
            message = json.dumps([command, str(cwd), env]).encode()
            socket.send_fds(self.socket, [message], [out.fileno(), err.fileno(), write])
            os.close(write)
            pid = int(report.readline())
            if not select.select([report], [], [], timeout)[0]:
                os.kill(pid, signal.SIGKILL)
                report.readline()
                raise subprocess.TimeoutExpired(command, timeout)
            code = int(report.readline())
            out.seek(0), err.seek(0)
            return subprocess.CompletedProcess(command, code, out.read().decode(), err.read().decode())


def serve():
    """Forks once for every request; returns the request in the forked process, and never in the server itself."""
    # what a script would import, its libraries' lazy parts included; nothing here computes, so no threads of OpenMP's start,
    # after which a fork would hang
    import cleanfid.fid, datasets, matplotlib.pyplot, PIL.Image, segment_anything.modeling   # noqa: E401, F401
    import torch._dynamo, torch.distributed, torch.utils.data, transformers                            # noqa: E401, F401
    from diffusers import (  # noqa: F401
        AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler, StableDiffusion3Pipeline,
        StableDiffusionXLPipeline, UNet2DConditionModel)
    from transformers import (  # noqa: F401
        CLIPImageProcessor, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPTokenizerFast)
    PIL.Image.init()
    gc.collect(), gc.freeze()                               # a script's own collections leave these pages shared
    requests = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 2 ** 20, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:                                  # waits for the script and says how it ended
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            pid = os.fork()
            if pid == 0:
                os.dup2(fds[0], 1), os.dup2(fds[1], 2)
                for fd in fds:
                    os.close(fd)
                return json.loads(message)
            os.write(fds[2], b'%d\n' % pid)
            os.write(fds[2], b'%d\n' % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
        for fd in fds:
            os.close(fd)


if __name__ == '__main__':
    (script, *arguments), folder, environment = serve()
    import numpy
    import torch
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(os.path.realpath(script))
    numpy.random.seed()
    if 'OMP_NUM_THREADS' in environment:
        torch.set_num_threads(int(environment['OMP_NUM_THREADS']))
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    main.__file__, code = os.path.abspath(script), 0
    try:
        exec(compile(open(main.__file__, 'rb').read(), main.__file__, 'exec'), main.__dict__)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown(), atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
