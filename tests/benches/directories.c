// Trees for the deletion benchmark, and the best loop of two threads that deletes them.
//
//   directories make many|deep|flat DIRECTORY SIZE UID    as the user
//   directories delete DIRECTORY                          everything in it
//
// The loop knows what it will find, trusts every name, and keeps a descriptor for each directory above: it is what
// there is to reach, not what root may do with the tree of a job.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static void check(long result, const char *what) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
}
#define DO(call) check((call), #call)

static int open_dir(int at, const char *name) {
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    check(fd, name);
    return fd;
}

static void file(int at, int number) {
    char name[32];
    snprintf(name, sizeof name, "file-%06d", number);
    int fd = openat(at, name, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    DO(fd);
    DO(write(fd, name, strlen(name)));
    close(fd);
}

static void make(const char *kind, int at, int size) {
    char name[32];
    if (!strcmp(kind, "flat")) {
        for (int i = 0; i < size; i++)
            file(at, i);
    } else if (!strcmp(kind, "many")) {
        for (int i = 0; i < size / 100; i++) {
            snprintf(name, sizeof name, "directory-%04d", i);
            DO(mkdirat(at, name, 0755));
            int inner = open_dir(at, name);
            for (int j = 0; j < 100; j++)
                file(inner, j);
            close(inner);
        }
    } else {
        for (int i = 0; i < size; i++) {
            DO(mkdirat(at, "deeper", 0755));
            int inner = open_dir(at, "deeper");
            if (i > 0)
                close(at);
            at = inner;
        }
    }
}

static void empty(int fd) {
    DIR *dir = fdopendir(fd);
    for (struct dirent *entry; (entry = readdir(dir));) {
        const char *name = entry->d_name;
        if (!strcmp(name, ".") || !strcmp(name, ".."))
            continue;
        if (entry->d_type == DT_DIR) {
            empty(open_dir(fd, name));
            DO(unlinkat(fd, name, AT_REMOVEDIR));
        } else {
            DO(unlinkat(fd, name, 0));
        }
    }
    closedir(dir);
}

struct entry {
    ino_t inode;
    char name[64];
};

struct list {
    struct entry *all;
    int count, room;
};

static void add(struct list *list, const struct dirent *entry) {
    if (list->count == list->room)
        list->all = realloc(list->all, (list->room = list->room * 2 + 64) * sizeof *list->all);
    struct entry *new = &list->all[list->count++];
    new->inode = entry->d_ino;
    snprintf(new->name, sizeof new->name, "%s", entry->d_name);
}

static int by_inode(const void *a, const void *b) {
    ino_t one = ((const struct entry *)a)->inode, other = ((const struct entry *)b)->inode;
    return one < other ? -1 : one > other;
}

static int top;
static struct list files, directories;
static atomic_int taken;

static void *worker(void *nothing) {
    for (int i; (i = atomic_fetch_add(&taken, 1)) < directories.count;) {
        empty(open_dir(top, directories.all[i].name));
        DO(unlinkat(top, directories.all[i].name, AT_REMOVEDIR));
    }
    return nothing;
}

static void delete(const char *path) {
    top = open_dir(AT_FDCWD, path);
    DIR *dir = fdopendir(dup(top));
    for (struct dirent *entry; (entry = readdir(dir));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        add(entry->d_type == DT_DIR ? &directories : &files, entry);
    }
    closedir(dir);
    // Two threads in one directory wait for each other. In the order of a listing each block of inodes would be
    // visited many times.
    qsort(files.all, files.count, sizeof *files.all, by_inode);
    for (int i = 0; i < files.count; i++)
        DO(unlinkat(top, files.all[i].name, 0));
    pthread_t second;
    pthread_attr_t deep;
    pthread_attr_init(&deep);
    pthread_attr_setstacksize(&deep, 64 << 20);
    pthread_create(&second, &deep, worker, NULL);
    worker(NULL);
    pthread_join(second, NULL);
}

int main(int words, char **word) {
    struct rlimit many = {1 << 16, 1 << 16};
    setrlimit(RLIMIT_NOFILE, &many);
    umask(022);
    if (words == 6 && !strcmp(word[1], "make")) {
        int at = open_dir(AT_FDCWD, word[3]);
        DO(fchown(at, atoi(word[5]), atoi(word[5])));
        DO(setegid(atoi(word[5])));
        DO(seteuid(atoi(word[5])));
        make(word[2], at, atoi(word[4]));
    } else if (words == 3 && !strcmp(word[1], "delete")) {
        delete(word[2]);
    } else {
        return 2;
    }
}
