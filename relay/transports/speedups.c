/* The inner loop of a fan-out: one send(2) for each socket, without a call into each socket's transport.
 *
 * Optional: without this module, relay/transports/plain_sockets.py has nothing to offer and every write goes through the
 * transports. Built by hatch_build.py against the limited API, so that one file serves all versions of Python from 3.11.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <sys/socket.h>
#include <sys/types.h>

#ifndef MSG_NOSIGNAL /* macOS; Python ignores SIGPIPE */
#define MSG_NOSIGNAL 0
#endif

enum { MOST = 32 };

/* Store the number that a method without arguments returns; 0 with an exception set where it returns none. */
static int ask(PyObject *objects, Py_ssize_t place, PyObject *method, long *number) {
    PyObject *object = PyTuple_GetItem(objects, place);
    PyObject *found = object == NULL || method == NULL ? NULL : PyObject_CallMethodObjArgs(object, method, NULL);
    *number = found == NULL ? -1 : PyLong_AsLong(found);
    Py_XDECREF(found);
    return found != NULL && (*number != -1 || PyErr_Occurred() == NULL);
}

/* The GIL is held throughout: nothing can close a descriptor between the moment its owner names it and the write. That
 * takes 32 writes, some 0.3 ms; to release it would let any busy thread keep the event loop waiting for 5 ms each time. */
static PyObject *send_to_each(PyObject *module, PyObject *args) {
    PyObject *transports, *sockets, *left, *size, *fileno;
    Py_ssize_t start, stop, length, place;
    const char *data;
    int descriptors[MOST], is_complete = 1, is_known = 1;
    ssize_t taken[MOST];
    if (!PyArg_ParseTuple(args, "O!O!nny#", &PyTuple_Type, &transports, &PyTuple_Type, &sockets, &start, &stop, &data,
                          &length))
        return NULL;
    if (start < 0 || stop < start || stop - start > MOST) {
        PyErr_Format(PyExc_ValueError, "expected at most %d sockets, got %zd to %zd", MOST, start, stop);
        return NULL;
    }
    /* Whatever can raise an exception comes before anything is sent. */
    size = PyUnicode_InternFromString("get_write_buffer_size");
    fileno = PyUnicode_InternFromString("fileno");
    for (place = start; is_known && place < stop; place++) {
        long waiting, descriptor;
        is_known = ask(transports, place, size, &waiting) && ask(sockets, place, fileno, &descriptor);
        descriptors[place - start] = is_known && waiting == 0 ? (int)descriptor : -1;
    }
    Py_XDECREF(size);
    Py_XDECREF(fileno);
    if (!is_known)
        return NULL;
    for (place = 0; place < stop - start; place++) {
        int descriptor = descriptors[place];
        taken[place] = descriptor < 0 ? -1 : send(descriptor, data, (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL);
        is_complete &= taken[place] == length;
    }
    if (is_complete)
        Py_RETURN_NONE;
    left = PyList_New(0);
    for (place = 0; left != NULL && place < stop - start; place++) {
        PyObject *pair;
        if (taken[place] == length)
            continue;
        pair = Py_BuildValue("(nn)", start + place, taken[place] < 0 ? (Py_ssize_t)0 : (Py_ssize_t)taken[place]);
        if (pair == NULL || PyList_Append(left, pair) < 0)
            Py_CLEAR(left);
        Py_XDECREF(pair);
    }
    return left;
}

static PyMethodDef methods[] = {
    {"send_to_each", send_to_each, METH_VARARGS,
     "Send data to the sockets from start to before stop; the places of those that did not take all, each with how much."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "relay.transports.speedups", NULL, 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_speedups(void) { return PyModuleDef_Init(&definition); }
