/* A worker in a hidden frame, for pages that are opened as files: browsers start no workers there.
   The site's search asks for one; on a server it gets the browser's own. */
(function () {
  "use strict";
  if (location.protocol !== "file:") { return; }

  function FrameWorker(address) {
    var self = this, target = new EventTarget();
    this.onmessage = null;
    this.addEventListener = target.addEventListener.bind(target);
    this.removeEventListener = target.removeEventListener.bind(target);
    this.dispatchEvent = target.dispatchEvent.bind(target);
    var frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.appendChild(frame);
    var inside = frame.contentWindow;
    this.ready = new Promise(function (resolve) { frame.addEventListener("load", resolve); });
    inside.document.open();
    inside.document.write("<!doctype html><html><body></body></html>");
    inside.postMessage = function (data) {
      var event = new MessageEvent("message", { data: data });
      self.dispatchEvent(event);
      if (self.onmessage) { self.onmessage(event); }
    };
    inside.importScripts = function () {
      return Promise.all(Array.prototype.map.call(arguments, function (script) {
        return new Promise(function (resolve, reject) {
          var tag = inside.document.createElement("script");
          tag.src = script;
          tag.onload = resolve;
          tag.onerror = reject;
          inside.document.body.appendChild(tag);
        });
      }));
    };
    this.inside = inside;
    this.frame = frame;
    var script = inside.document.createElement("script");
    script.src = String(address);
    inside.document.body.appendChild(script);
    inside.document.close();
  }
  FrameWorker.prototype.postMessage = function (data) {
    var inside = this.inside;
    this.ready.then(function () {
      inside.dispatchEvent(new inside.MessageEvent("message", { data: data }));
    });
  };
  FrameWorker.prototype.terminate = function () { this.frame.remove(); };

  window.Worker = FrameWorker;
})();
