/* A disk on which the n-th call fails, for LD_PRELOAD: it also reaches writes from C++ and Rust (pyarrow, safetensors).

   `disk_arm` counts, from then on, the calls of some kinds on paths under a folder. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static char kinds[256];
static int error, is_lasting, log_file = -1;
static long fails_at, calls, is_counting;

/* `names`: the kinds that count, ",write,fsync,". Fail the `number`-th (none if 0), with `lasting` also all later ones, with
   errno `code`; code 0 makes a write short. Each counted call is written to the file `log`, if any. */
void disk_arm(const char *path, const char *names, long number, int code, int lasting, const char *log) {
    snprintf(folder, sizeof folder, "%s", path);
    snprintf(kinds, sizeof kinds, "%s", names);
    error = code, is_lasting = lasting, fails_at = number, calls = 0;
    log_file = *log ? syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644) : -1;
    is_counting = 1;
}

/* Return how many calls were counted. */
long disk_disarm(void) {
    is_counting = 0;
    return calls;
}

static int fails(const char *kind, int fd, const char *path) {
    char full[PATH_MAX] = "", link[64], name[32];
    if (!is_counting) return 0;
    int saved = errno;
    snprintf(name, sizeof name, ",%s,", kind);
    if (!path || *path != '/') {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        if (fd == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        ssize_t size = readlink(link, full, sizeof full - 1);
        full[size > 0 ? size : 0] = 0;
        if (path) strncat(strncat(full, "/", sizeof full - strlen(full) - 1), path, sizeof full - strlen(full) - 1);
        path = full;
    }
    errno = saved;
    if (strncmp(path, folder, strlen(folder)) || !strstr(kinds, name)) return 0;
    long number = __sync_add_and_fetch(&calls, 1);
    if (log_file >= 0) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%s %s\n", kind, path + strlen(folder));
        syscall(SYS_write, log_file, line, size);
    }
    if (!fails_at || !(number == fails_at || (is_lasting && number > fails_at))) return 0;
    errno = error;
    return 1;
}

#define REAL(name) (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define WRAP(kind, result, name, parameters, arguments, fd, path) \
    result name parameters { return fails(kind, fd, path) ? -1 : (REAL(name)) arguments; }
#define WRITE(name, parameters, arguments, shorter) \
    ssize_t name parameters {                       \
        if (!fails("write", fd, NULL)) return (REAL(name)) arguments; \
        if (error) return -1;                       \
        shorter;                                    \
        return (REAL(name)) arguments;              \
    }
#define HALF if (size > 1) size /= 2
#define FIRST if (count > 1) count = 1

WRITE(write, (int fd, const void *data, size_t size), (fd, data, size), HALF)
WRITE(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), HALF)
WRITE(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), HALF)
WRITE(writev, (int fd, const struct iovec *parts, int count), (fd, parts, count), FIRST)
WRITE(sendfile, (int fd, int from, off_t *at, size_t size), (fd, from, at, size), HALF)
WRITE(sendfile64, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size), HALF)
/* Flushing takes most of the time, and nothing here has to survive a power failure. */
int fsync(int fd) { return fails("fsync", fd, NULL) ? -1 : *folder ? 0 : (REAL(fsync))(fd); }
int fdatasync(int fd) { return fails("fsync", fd, NULL) ? -1 : *folder ? 0 : (REAL(fdatasync))(fd); }
WRAP("truncate", int, ftruncate, (int fd, off_t size), (fd, size), fd, NULL)
WRAP("truncate", int, ftruncate64, (int fd, off64_t size), (fd, size), fd, NULL)
WRAP("rename", int, rename, (const char *from, const char *to), (from, to), AT_FDCWD, to)
WRAP("rename", int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), b, to)
WRAP("link", int, link, (const char *from, const char *to), (from, to), AT_FDCWD, to)
WRAP("link", int, linkat, (int a, const char *from, int b, const char *to, int f), (a, from, b, to, f), b, to)
WRAP("mkdir", int, mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
WRAP("mkdir", int, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), at, path)
WRAP("remove", int, unlink, (const char *path), (path), AT_FDCWD, path)
WRAP("remove", int, unlinkat, (int at, const char *path, int flags), (at, path, flags), at, path)
WRAP("remove", int, rmdir, (const char *path), (path), AT_FDCWD, path)
WRAP("chmod", int, chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
WRAP("chmod", int, fchmod, (int fd, mode_t mode), (fd, mode), fd, NULL)
WRAP("chmod", int, fchmodat, (int at, const char *path, mode_t m, int f), (at, path, m, f), at, path)
WRAP("utime", int, utimensat, (int at, const char *path, const struct timespec t[2], int f), (at, path, t, f), at, path)

int close(int fd) {
    int flags = is_counting ? fcntl(fd, F_GETFL) : -1, failed = 0, code;
    if (flags >= 0 && (flags & O_ACCMODE) != O_RDONLY) failed = fails("close", fd, NULL), code = errno;
    int result = (REAL(close))(fd);
    return failed ? errno = code, -1 : result;
}

#define OPEN(name, parameters, arguments, at)                   \
    int name parameters {                                       \
        mode_t mode = 0;                                        \
        if (flags & (O_CREAT | O_TMPFILE)) {                    \
            va_list rest;                                       \
            va_start(rest, flags);                              \
            mode = va_arg(rest, mode_t);                        \
            va_end(rest);                                       \
            if (flags & O_CREAT && fails("open", at, path)) return -1; \
        }                                                       \
        return (REAL(name)) arguments;                          \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
