// The least that a worker's whole life can cost: bare system calls of one long-lived root process, in the order in
// which the helper does the same. No socket, no checks, no filter, no limits, no record that lasts.
//
//   bare STATE USERDB CGROUPS AGENT STARTED
//
// For each byte on standard input it makes a worker, copies the agent for it, starts that as the worker's user in
// namespaces of its own, waits until the agent has opened the file STARTED, kills, deletes, and prints how many
// microseconds that took.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/mount.h>
#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void check(long result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
}
#define DO(call) check((call), #call)

static int state, userdb, cgroups, agent, opens;
static const char *started;

static void put(int dir, const char *name, const char *text, int mode) {
    int fd = openat(dir, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);
    DO(fd);
    DO(write(fd, text, strlen(text)));
    close(fd);
}

static int tree_copy(const char *from, unsigned flags) {
    int fd = syscall(SYS_open_tree, AT_FDCWD, from, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
    DO(fd);
    struct mount_attr attr = {.attr_set = flags, .propagation = MS_PRIVATE};
    DO(syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof attr));
    return fd;
}

static void attach(int fd, const char *to) {
    DO(syscall(SYS_move_mount, fd, "", AT_FDCWD, to, MOVE_MOUNT_F_EMPTY_PATH));
    close(fd);
}

// The root of every worker, once: the host's directories, read-only, on a small tmpfs.
static void make_rootfs(const char *state_path) {
    DO(unshare(CLONE_NEWNS));
    DO(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
    int own = tree_copy(state_path, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
    DO(mount("tmpfs", "/mnt", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755"));
    static const char *hosts[] = {"usr", "etc", "srv", "var", NULL};
    static const char *empty[] = {"home", "run", "input", "work", "tmp", "proc", "dev", "opt", "opt/buildomat", ".own", NULL};
    char path[256], host[256];
    for (int i = 0; hosts[i]; i++) {
        snprintf(path, sizeof path, "/mnt/%s", hosts[i]);
        snprintf(host, sizeof host, "/%s", hosts[i]);
        DO(mkdir(path, 0755));
        attach(tree_copy(host, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV), path);
    }
    for (int i = 0; empty[i]; i++) {
        snprintf(path, sizeof path, "/mnt/%s", empty[i]);
        DO(mkdir(path, 0755));
    }
    attach(own, "/mnt/.own");
    DO(chdir("/mnt"));
    DO(syscall(SYS_pivot_root, ".", "."));
    DO(umount2(".", MNT_DETACH));
    DO(chdir("/"));
}

static const char *WRITABLE_DIRS[] = {
    "fs/home/user", "fs/run/buildomat", "fs/input", "fs/work", "fs/tmp", "fs/var-tmp", "fs/opt-buildomat", NULL,
};
static const char *ABOVE[] = {"fs/home", "fs/run", "fs", NULL};

static void remove_all(int at, const char *name) {
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DO(fd);
    DIR *dir = fdopendir(fd);
    for (struct dirent *entry; (entry = readdir(dir));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (unlinkat(fd, entry->d_name, 0) < 0)
            remove_all(fd, entry->d_name);
    }
    closedir(dir);
    DO(unlinkat(at, name, AT_REMOVEDIR));
}

static void bind_at(const char *own, const char *name, const char *to) {
    char path[256];
    snprintf(path, sizeof path, "/.own/%s/%s", own, name);
    attach(tree_copy(path, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV), to);
}

// What the worker's first process does. The agent is a child of it, as it is for the helper.
static void first_process(const char *id, unsigned uid) {
    static const struct { const char *name; int major, minor; } nodes[] = {
        {"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}};
    char path[256];
    setsid();
    bind_at(id, "fs/home", "/home");
    bind_at(id, "fs/run", "/run");
    bind_at(id, "fs/input", "/input");
    bind_at(id, "fs/work", "/work");
    bind_at(id, "fs/tmp", "/tmp");
    bind_at(id, "fs/var-tmp", "/var/tmp");
    bind_at(id, "fs/opt-buildomat", "/opt/buildomat");
    bind_at(id, "passwd", "/etc/passwd");
    bind_at(id, "group", "/etc/group");
    DO(mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k"));
    for (int i = 0; i < 6; i++) {
        snprintf(path, sizeof path, "/dev/%s", nodes[i].name);
        DO(mknod(path, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)));
    }
    DO(mkdir("/dev/pts", 0755));
    DO(mkdir("/dev/shm", 0755));
    DO(mkdir("/dev/mqueue", 0755));
    DO(mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666"));
    DO(mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"));
    DO(mount("mqueue", "/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV, NULL));
    DO(mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
    DO(umount2("/.own", MNT_DETACH));
    for (int cap = 0; prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) == 0; cap++) {
    }
    DO(setgroups(0, NULL));
    DO(setresgid(uid, uid, uid));
    DO(setresuid(uid, uid, uid));
    DO(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    pid_t child = vfork();
    DO(child);
    if (child == 0) {
        char *arguments[] = {"/run/agent", "install", (char *)started, NULL};
        char *environment[] = {"PATH=/usr/bin:/bin", NULL};
        execve("/run/agent", arguments, environment);
        _exit(127);
    }
    while (wait(NULL) > 0) {
    }
    _exit(0);
}

static void life(unsigned number) {
    char id[32], text[256], name[64], link[64];
    unsigned uid = 1900000000 + number % 1000;
    snprintf(id, sizeof id, "w%u", number);
    // A user.
    DO(mkdirat(state, id, 0700));
    int own = openat(state, id, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    snprintf(text, sizeof text, "slot a\nuid %u\n", uid);
    put(own, "record.part", text, 0600);
    DO(renameat(own, "record.part", own, "record"));
    for (int i = 2; i >= 0; i--)
        DO(mkdirat(own, ABOVE[i], 0755));
    for (int i = 0; WRITABLE_DIRS[i]; i++) {
        DO(mkdirat(own, WRITABLE_DIRS[i], 0755));
        DO(fchownat(own, WRITABLE_DIRS[i], uid, uid, 0));
    }
    for (int i = 0; i < 2; i++) {
        const char *kind = i ? "group" : "user";
        snprintf(name, sizeof name, "bmat-%s.%s", id, kind);
        snprintf(link, sizeof link, "%u.%s", uid, kind);
        snprintf(text, sizeof text, "{\"%sName\":\"bmat-%s\",\"uid\":%u,\"gid\":%u}\n", kind, id, uid, uid);
        put(userdb, name, text, 0644);
        DO(symlinkat(name, userdb, link));
    }
    // The agent.
    int copy = openat(own, "fs/run/agent", O_WRONLY | O_CREAT | O_CLOEXEC, 0755);
    DO(copy);
    static char buffer[128 << 10];
    long n;
    for (off_t at = 0; (n = pread(agent, buffer, sizeof buffer, at)) > 0; at += n)
        DO(write(copy, buffer, n));
    close(copy);
    snprintf(text, sizeof text, "root:x:0:0:root:/root:/bin/bash\nbmat-%s:x:%u:%u::/home/user:/bin/bash\n", id, uid, uid);
    put(own, "passwd", text, 0644);
    snprintf(text, sizeof text, "root:x:0:\nbmat-%s:x:%u:\n", id, uid);
    put(own, "group", text, 0644);
    DO(mkdirat(cgroups, id, 0755));
    int cgroup = openat(cgroups, id, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    // Its first process.
    struct clone_args args = {
        .flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_INTO_CGROUP,
        .exit_signal = SIGCHLD,
        .cgroup = cgroup,
    };
    long child = syscall(SYS_clone3, &args, sizeof args);
    DO(child);
    if (child == 0)
        first_process(id, uid);
    struct inotify_event first;
    DO(read(opens, &first, sizeof first));
    // Its end.
    int kill_file = openat(cgroup, "cgroup.kill", O_WRONLY | O_CLOEXEC);
    DO(write(kill_file, "1", 1));
    close(kill_file);
    DO(waitpid(child, NULL, 0));
    int events = openat(cgroup, "cgroup.events", O_RDONLY | O_CLOEXEC);
    char populated[128];
    for (;;) {
        n = pread(events, populated, sizeof populated - 1, 0);
        populated[n] = 0;
        if (strstr(populated, "populated 0"))
            break;
        struct pollfd change = {.fd = events, .events = POLLPRI};
        poll(&change, 1, 1000);
    }
    close(events);
    close(cgroup);
    DO(unlinkat(cgroups, id, AT_REMOVEDIR));
    close(own);
    remove_all(state, id);
    for (int i = 0; i < 2; i++) {
        const char *kind = i ? "group" : "user";
        snprintf(name, sizeof name, "bmat-%s.%s", id, kind);
        snprintf(link, sizeof link, "%u.%s", uid, kind);
        DO(unlinkat(userdb, link, 0));
        DO(unlinkat(userdb, name, 0));
    }
}

int main(int count, char **arguments) {
    if (count != 6)
        return 2;
    umask(0);
    state = open(arguments[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    userdb = open(arguments[2], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    cgroups = open(arguments[3], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    agent = open(arguments[4], O_RDONLY | O_CLOEXEC);
    started = arguments[5];
    opens = inotify_init1(IN_CLOEXEC);
    DO(state), DO(userdb), DO(cgroups), DO(agent), DO(opens);
    DO(inotify_add_watch(opens, started, IN_OPEN));
    make_rootfs(arguments[1]);
    char byte;
    for (unsigned number = 0; read(0, &byte, 1) == 1; number++) {
        struct timespec begin, end;
        clock_gettime(CLOCK_MONOTONIC, &begin);
        life(number);
        clock_gettime(CLOCK_MONOTONIC, &end);
        printf("%.3f\n", (end.tv_sec - begin.tv_sec) * 1e6 + (end.tv_nsec - begin.tv_nsec) / 1e3);
        fflush(stdout);
    }
}
